import datetime
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora import methods
from fedsmoothlora.config import (
    Unset,
    first_difference,
    parse_override,
    read,
    read_run_config,
    recipes,
    renamed,
    to_toml,
)
from fedsmoothlora.config.shipped import recipe_text
from fedsmoothlora.errors import ConfigError

BASE: dict[str, Any] = {"name": "x", "model": {"source": "folder"}, "data": {"source": "pkg:mnist-5k"}}


def with_values(**sections: Any) -> dict[str, Any]:
    table = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    for key, value in sections.items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    return table


@pytest.fixture
def file(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(table: dict[str, Any]) -> Path:
        path = tmp_path / "mine.toml"
        path.write_text(tomli_w.dumps(table))
        return path

    return write


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (with_values(trainin={"rounds": 3}), ["trainin", "did you mean 'training'"]),
        (with_values(training={"round": 3}), ["training.round:", "unknown key; did you mean 'rounds'"]),
        (with_values(training={"rounds": 0}), ["training.rounds = 0", "greater than or equal to 1"]),
        (with_values(training={"rounds": 2.5}), ["training.rounds = 2.5", "valid integer"]),
        (with_values(training={"rounds": True}), ["training.rounds = True", "valid integer"]),
        (with_values(training={"lr": True}), ["training.lr = True", "valid number"]),
        (with_values(training={"lr": "0.1"}), ["training.lr = '0.1'", "valid number"]),
        (with_values(training={"lr": -1}), ["training.lr = -1", "greater than 0"]),
        (with_values(training={"momentum": 1}), ["training.momentum = 1", "less than 1"]),
        (with_values(training={"optimizer": "adam"}), ["training.optimizer = 'adam'", "'sgd' or 'adamw'"]),
        (with_values(training={"epochs": 1, "steps": 2}), ["training.epochs = 1", "steps = 2", "one of"]),
        (
            with_values(training={"optimizer": "adamw", "momentum": 0.5}),
            ["training.momentum = 0.5", "optimizer = 'sgd'"],
        ),
        (with_values(training={"lr": 0.1, "lr_min": 0.2}), ["lr_min = 0.2", "training.lr = 0.1"]),
        (with_values(training=3), ["training = 3", "[training]"]),
        (with_values(seed=-1), ["seed = -1", "greater than or equal to 0"]),
        (with_values(seed=True), ["seed = True", "valid integer"]),
        (with_values(lora={"dropout": 1.0}), ["lora.dropout = 1.0", "less than 1"]),
        (with_values(lora={"target_modules": "q_proj"}), ["lora.target_modules = 'q_proj'", "valid array"]),
        (with_values(lora={"target_modules": ["q_proj", 3]}), ["lora.target_modules", "valid string"]),
        (
            with_values(lora={"target_modules": []}, model={"head": "lora"}),
            ["lora.target_modules is empty", "model.head = 'full'"],
        ),
        (with_values(model={"head": "half"}), ["model.head = 'half'", "'full' or 'lora'"]),
        (with_values(partition={"kind": "dirichlet"}), ["partition.alpha is missing", "dirichlet"]),
        (with_values(partition={"alpha": 0.5}), ["partition.alpha", "partition.kind = 'dirichlet'"]),
        (with_values(method={"name": "fedsmooth"}), ["method.name", "'fedsmooth'", "'fedsmoothlora'"]),
        (with_values(method={"gamma": 3.0}), ["[method] needs name", "fedit"]),
        (with_values(method={"name": "fedit", "gamma": 3.0}), ["method.gamma", "unknown key"]),
        (with_values(method={"name": "fedsmoothlora", "zeta": 2}), ["method.zeta = 2", "less than or equal"]),
        (with_values(personal={"ditto": -0.1}), ["personal.ditto = -0.1", "greater than or equal to 0"]),
        (with_values(personal={"steps": 3}), ["personal.steps = 3", "personal.ditto"]),
        (
            with_values(personal={"ditto": 0.1}, method={"name": "fedsa"}),
            ["personal.ditto = 0.1", "'fedsa'", "no global model", "evaluation.clients = true"],
        ),
        (
            with_values(evaluation={"personal_steps": 5}, method={"name": "local"}),
            ["evaluation.personal_steps = 5", "'local'", "no global model", "evaluation.clients = true"],
        ),
        (
            with_values(
                personal={"ditto": 0.1}, method={"name": "flexlora"}, lora={"client_ranks": "halving"}
            ),
            ["personal.ditto = 0.1", "lora.client_ranks", "whole global model"],
        ),
        ({"name": "x", "data": {"source": "y"}}, ["model is missing"]),
        ({**BASE, "model": {}}, ["model.source is missing"]),
    ],
)
def test_an_error_names_the_file_the_key_the_value_and_what_would_be_right(
    file: Callable[[dict[str, Any]], Path], table: dict[str, Any], said: list[str]
) -> None:
    path = file(table)
    with pytest.raises(ConfigError) as error:
        read(path)
    for words in (str(path), *said):
        assert words in str(error.value)


@pytest.mark.parametrize("key", ["training.lr", "lora.alpha", "training.weight_decay"])
def test_an_infinite_value_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        read(BASE, {key: float("inf")})


@pytest.mark.parametrize("key", ["training.lr", "lora.alpha", "method.gamma"])
def test_nan_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        read(BASE, {"method.name": "fedsmoothlora", key: float("nan")})


def test_a_heads_rank_without_a_head_that_lora_adapts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora\.head_r"):
        read(BASE, {"model.head": "full", "lora.head_r": 3})


def test_a_learning_rate_of_a_head_that_is_not_trained_whole_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.head_lr = 0\.1 belongs to a head that is"):
        read(BASE, {"model.head": "lora", "training.head_lr": 0.1})
    assert read(BASE, {"model.head": "full", "training.head_lr": 0.1}).training.head_lr == 0.1


def test_a_file_that_is_not_there_or_not_toml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: there is no such file"):
        read(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_text("rounds = = 3")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML.*line 1"):
        read(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml: cannot be read as UTF-8"):
        read(tmp_path / "latin.toml")


def test_a_misspelt_recipe_is_answered_with_the_recipes_there_are() -> None:
    with pytest.raises(ConfigError, match=r"'quikstart' is neither .*; did you mean 'quickstart'\?"):
        read("quikstart")


def test_whole_numbers_are_taken_for_floats() -> None:
    config = read(with_values(training={"lr": 1}, lora={"alpha": 16}))
    assert (config.training.lr, config.lora.alpha) == (1.0, 16.0)
    assert type(config.training.lr) is type(config.lora.alpha) is float


def test_overrides_take_the_place_of_values_and_leave_the_table_alone() -> None:
    table = with_values(training={"rounds": 3, "batch_size": 4})
    config = read(table, {"training.rounds": 5, "lora.r": 2, "seed": 9})
    assert (config.training.rounds, config.training.batch_size, config.lora.r, config.seed) == (5, 4, 2, 9)
    assert table == with_values(training={"rounds": 3, "batch_size": 4})


def test_text_classifiers_default_to_adamw_and_keep_what_is_set() -> None:
    texts = with_values(task={"kind": "text-classification"}, training={"rounds": 2})
    assert (read(texts).training.optimizer, read(texts).training.lr) == ("adamw", 0.001)
    own = {"training.optimizer": "sgd", "training.lr": 0.1}
    assert (read(texts, own).training.optimizer, read(texts, own).training.lr) == ("sgd", 0.1)
    assert read(with_values(task={"kind": "image-classification"})).training.optimizer == "sgd"


def test_another_method_starts_from_its_own_defaults() -> None:
    table = with_values(method={"name": "fedsmoothlora", "gamma": 3.0})
    assert read(table, {"method.name": "fedit"}).method.name == "fedit"
    assert read(table, {"method.name": "fedsmoothlora"}).method.gamma == 3.0


def test_an_option_of_another_method_is_refused_in_an_override_too() -> None:
    with pytest.raises(ConfigError, match=r"method\.gamma: unknown key"):
        read(BASE, {"method.gamma": 3.0, "method.name": "fedit"})


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"seed is a value, not a section"):
        read(with_values(seed=1), {"seed.x": 1})


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("training.rounds=20", "training.rounds", 20),
        ("training.lr = 1e-3", "training.lr", 1e-3),
        ("method.name=fedit", "method.name", "fedit"),
        ('name="a = b"', "name", "a = b"),
        ("lora.use_rslora=true", "lora.use_rslora", True),
        ('lora.target_modules=["qkv", "head"]', "lora.target_modules", ["qkv", "head"]),
        ("model.source=pkg:dinov2-small", "model.source", "pkg:dinov2-small"),
        ("model.source=/a=b", "model.source", "/a=b"),
    ],
)
def test_the_value_of_an_override_is_toml_or_a_bare_word(text: str, key: str, value: Any) -> None:
    assert parse_override(text) == (key, value)


def test_a_key_without_a_value_has_its_default(tmp_path: Path) -> None:
    """The same configuration without the key is the oracle."""
    file = tmp_path / "own.toml"
    text = recipe_text("glue-stsb")
    file.write_text(text.replace('subset = "stsb"\n', "").replace("batch_size = 32\n", ""))
    unset = dict(map(parse_override, ["data.subset=", "training.batch_size= "]))
    assert read("glue-stsb", unset) == read(file)
    assert read("glue-stsb", unset).training.batch_size == 16  # the task's default
    evaluation = dict(map(parse_override, ["evaluation="]))  # a whole section
    assert read("glue-stsb", evaluation).evaluation == read(file, {"evaluation": {}}).evaluation


def test_an_empty_text_is_written_with_quotation_marks() -> None:
    assert type(parse_override("task.prompt=''")[1]) is str
    assert read("quickstart", dict(map(parse_override, ['description=""']))).description == ""


def test_removing_epochs_leaves_steps() -> None:
    table = {**tomllib.loads(recipe_text("quickstart")), "training": {"rounds": 1, "steps": 3, "epochs": 2}}
    assert read(table, dict(map(parse_override, ["training.epochs="]))).training.steps == 3


@pytest.mark.parametrize("key", ["data.subsett", "nothing.at.all", "data.where_column", "name.x"])
def test_a_key_that_is_not_set_cannot_be_removed(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"--set {key}= removes a key, and the configuration does not set"):
        read("quickstart", {key: Unset()})


@pytest.mark.parametrize("text", ["training.rounds", "=3", " =3"])
def test_an_override_without_key_and_value_is_shown_how(text: str) -> None:
    with pytest.raises(ConfigError, match=r"KEY=VALUE, for instance training\.rounds=20") as error:
        parse_override(text)
    assert repr(text) in str(error.value)


def settings_of(config: Any) -> tuple[Any, ...]:
    """What two configurations must share."""
    return (config.method.name, config.method.options(), vars(config))


@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_every_recipe_comes_back_from_its_own_toml(recipe: str, tmp_path: Path) -> None:
    config = read(recipe)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert settings_of(read(path)) == settings_of(config)
    assert config == read(recipe)


@pytest.mark.parametrize("recipe", sorted(recipes()))
def test_every_recipe_is_named_as_its_file_and_says_what_it_does(recipe: str) -> None:
    config = read(recipe)
    assert config.name == recipe
    assert config.description == recipes()[recipe]
    assert len(config.description) > 20


@pytest.mark.parametrize("method", methods.names())
def test_every_methods_defaults_are_written_out(method: str) -> None:
    config = read(BASE, {"method.name": method})
    table = tomllib.loads(to_toml(config))
    assert settings_of(read(table)) == settings_of(config)
    assert {"name", *(k for k, v in config.method.options().items() if v is not None)} == set(table["method"])


SECTIONS = ["", "model", "lora", "data", "partition", "method", "training", "transport"]
SECTIONS += ["evaluation", "machine"]
FULL = to_toml(read(BASE))
KNOWN = {
    "": {*tomllib.loads(FULL), "description"},
    **{
        section: {
            *(read(BASE).method.options() if section == "method" else vars(getattr(read(BASE), section))),
            "name",
        }
        for section in SECTIONS[1:]
    },
}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    section=st.sampled_from(SECTIONS),
    key=st.text(st.characters(codec="utf-8", exclude_characters="."), min_size=1, max_size=20),
    value=st.one_of(st.integers(), st.text(), st.booleans(), st.lists(st.integers())),
)
def test_an_unknown_key_is_always_refused_by_name(section: str, key: str, value: Any) -> None:
    if key in KNOWN[section]:
        return
    table = tomllib.loads(FULL)
    (table[section] if section else table)[key] = value
    with pytest.raises(ConfigError) as error:
        read(table)
    assert (f"{section}.{key}" if section else key) in str(error.value)


def test_the_number_of_clients_at_once_is_no_mathematics(toy_table: dict[str, Any]) -> None:
    one, other = (to_toml(read(toy_table, {"machine.jobs": jobs})) for jobs in (1, 4))
    assert one != other
    assert first_difference(one, other) is None
    more = to_toml(read(toy_table, {"machine.threads": 4}))
    assert first_difference(one, more) == "machine.threads"
    assert first_difference(one, more, ignoring=["machine.threads"]) is None
    # A run that is older than the key.
    assert first_difference(one, one.replace("jobs = 1\n", "")) is None


def test_everything_that_is_wrong_is_listed_in_one_error() -> None:
    table = with_values(training={"rounds": 0, "steps": True}, partition={"kind": "shards"}, sed=3)
    with pytest.raises(ConfigError) as error:
        read(table)
    first, *rest = str(error.value).splitlines()
    assert first == "configuration: 4 problems"
    assert sorted(line.strip().partition(":")[0] for line in rest) == [
        "partition.clients is missing",
        "sed",
        "training.rounds = 0",
        "training.steps = True",
    ]


def test_a_bound_may_be_infinite_where_that_means_none() -> None:
    assert read(BASE, {"uploads.max_norm_factor": float("inf")}).uploads.max_norm_factor == float("inf")


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), Path("folder"), {1, 2}])
def test_a_value_that_no_key_takes_is_refused_by_name(value: Any) -> None:
    for key in ("name", "training", "training.rounds", "lora.target_modules", "partition", "method"):
        with pytest.raises(ConfigError, match=key):
            read(BASE, {key: value})


def test_another_partition_keeps_the_old_keys_that_it_has_too() -> None:
    table = with_values(partition={"kind": "dirichlet", "clients": 7, "alpha": 0.1, "min_size": 3})
    assert read(table, {"partition.kind": "sizes"}).partition.options() == {"clients": 7, "min_size": 3}
    assert read(table, {"partition.kind": "iid"}).partition.options() == {"clients": 7}
    assert read(table, {"partition.kind": "dirichlet"}) == read(table)


def test_a_file_may_begin_with_a_byte_order_mark(file: Callable[[dict[str, Any]], Path]) -> None:
    path = file(BASE)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == read(BASE)


RENAMED = {"training.passes": "training.epochs", "training.mu": "training.proximal_mu", "trainer": "machine"}
OLD = {"training": {"passes": 3, "mu": 0.5}, "trainer": {"threads": 1}}


def test_an_old_key_in_a_users_file_is_refused_with_the_new_one(
    file: Callable[[dict[str, Any]], Path],
) -> None:
    with pytest.raises(ConfigError) as error:
        read(file({**BASE, **OLD}), renamed=RENAMED)
    for words in ("training.passes is now called training.epochs", "trainer is now called machine"):
        assert words in str(error.value)
    with pytest.raises(ConfigError, match=r"training\.mu is now called training\.proximal_mu"):
        read(BASE, {"training.mu": 0.5}, renamed=RENAMED)


def test_old_keys_in_a_runs_folder_are_translated(file: Callable[[dict[str, Any]], Path]) -> None:
    path = file({**BASE, **OLD})
    config = read_run_config(path, {"seed": 3}, renamed=RENAMED)
    assert (config.training.epochs, config.training.proximal_mu, config.machine.threads) == (3, 0.5, 1)
    assert config.seed == 3
    assert first_difference(to_toml(config), path.read_text(), renamed=RENAMED) is not None
    old = to_toml(config).replace("epochs = 3", "passes = 3")
    assert first_difference(to_toml(config), old, renamed=RENAMED) is None
    with pytest.raises(ConfigError, match=r"training\.mu is now called"):
        read_run_config(path, {"training.mu": 0.1}, renamed=RENAMED)


def test_every_new_name_is_a_key_that_there_is() -> None:
    for new in renamed.RENAMED.values():
        section, _, key = new.rpartition(".")
        assert section == "method" or key in KNOWN[section]


def modules_after(code: str) -> set[str]:
    """Names of the modules that a fresh process has imported after running some code."""
    code = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


READS = "from fedsmoothlora.config import read, recipes\nfor recipe in recipes(): read(recipe)"
LISTS = (
    "from typer.testing import CliRunner\nfrom fedsmoothlora.cli import app\n"
    "for kind in ('recipes', 'partitions'): assert CliRunner().invoke(app, ['list', kind]).exit_code == 0"
)


@pytest.mark.parametrize("code", [READS, LISTS], ids=["read", "list"])
def test_reading_a_configuration_loads_no_library_of_models_or_data(code: str) -> None:
    assert not modules_after(code) & {"transformers", "peft", "accelerate", "datasets", "pyarrow", "PIL"}


@pytest.mark.parametrize("code", [READS, LISTS], ids=["read", "list"])
def test_reading_a_configuration_does_not_load_torch(code: str) -> None:
    assert not modules_after(code) & {"torch", "numpy"}
