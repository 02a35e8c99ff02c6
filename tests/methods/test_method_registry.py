"""Methods are found by their files, or declared by other installed packages, without importing torch."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import invalidate_caches
from pathlib import Path

import pytest
from PIL import Image

from conftest import textures
from fedsmoothlora import methods
from fedsmoothlora.cli.catalogue import entries, group_of
from fedsmoothlora.config import ConfigError, read, to_toml
from fedsmoothlora.errors import MethodError
from fedsmoothlora.methods import Method, registry

FILES = sorted(
    path.stem
    for path in Path(methods.__file__).parent.iterdir()
    if path.stem not in ("__init__", "__pycache__", "base", "registry")
)

# A package with one method: the products' mean over the clients, halved.
MODULE = '''
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt

from fedsmoothlora.algebra.averaging import mean_product
from fedsmoothlora.methods import Method, ServerUpdate, ServerView, Start, ClientView, Traits


@dataclass(frozen=True, kw_only=True)
class Halved(Method):
    """Halved (arXiv 0000.00000): half of the mean product is merged.

    Not a second line.
    """

    share: Annotated[float, Gt(0)] = 0.5

    name: ClassVar[str] = "halved"
    traits: ClassVar[Traits] = Traits(stable_parameters=True)

    def start(self, client: ClientView) -> Start:
        return Start(lora={name: client.initial(name) for name in client.layers})

    def aggregate(self, uploads: Sequence, weights: Sequence[float], server: ServerView) -> ServerUpdate:
        means = {name: mean_product(uploads, weights, name) for name in server.layers}
        return ServerUpdate(merge={name: mean * self.share for name, mean in means.items()})
'''

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a package that declares a method, into a folder that is on the path."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def call(
        name: str = "halved",
        target: str = "halving:Halved",
        module: str = MODULE,
        package: str = "fed-halving",
    ) -> Path:
        (folder / "halving.py").write_text(module)
        info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[fedsmoothlora.methods]\n{name} = {target}\n")
        sys.modules.pop("halving", None)
        invalidate_caches()
        registry._installed.cache_clear()
        return folder

    yield call
    sys.modules.pop("halving", None)
    monkeypatch.undo()
    registry._installed.cache_clear()


def outcome(*command: str, folder: Path | None = None) -> str:
    """Standard output of a Python process that has ``folder`` on its path."""
    path = [] if folder is None else [str(folder)]
    code = f"import sys; sys.path[:0] = {path!r}\n{command[0]}"
    done = subprocess.run(
        [sys.executable, "-c", code, *command[1:]], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- built-in methods --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_file_defines_the_method_of_its_name(name: str) -> None:
    assert name in methods.names()
    found = methods.find(name)
    assert issubclass(found, Method)
    assert found.name == name
    assert found.__module__.startswith(f"fedsmoothlora.methods.{name}")
    assert found.summary().endswith(".")
    assert found.numbers_down
    assert found.limitation


def test_methods_are_listed_by_family() -> None:
    families = {name: group_of("methods", name) for name, _ in entries("methods")[1]}
    assert list(dict.fromkeys(families.values())) == ["exact", "factor-averaging", "merged", "personal"]
    assert list(families) == list(methods.by_family()) == sorted(families, key=lambda n: (families[n], n))
    assert sorted(families) == list(methods.names())
    for name, family in families.items():
        assert (family == "personal") is not methods.find(name).traits.global_model


def test_methods_are_loaded_without_torch() -> None:
    code = (
        "from fedsmoothlora import methods\n"
        "for name in methods.names(): methods.find(name)().options()\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules}"
        " & {'torch', 'transformers', 'peft', 'accelerate', 'numpy', 'safetensors'}))"
    )
    assert outcome(code).strip() == "[]"


def test_a_key_with_the_name_of_a_step_is_kept_in_another_field() -> None:
    assert methods.find("fedsmoothlora").option_names()["start"] == "start_mode"
    config = read("quickstart", {"method.start": "exact"})
    assert config.method.options()["start"] == "exact"
    assert 'start = "exact"' in to_toml(config)
    with pytest.raises(ConfigError, match=r"method\.start = 'warm'"):
        read("quickstart", {"method.start": "warm"})
    with pytest.raises(ConfigError, match=r"method\.start_mode: unknown key; did you mean 'start'"):
        read("quickstart", {"method.start_mode": "exact"})


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(MethodError, match=r"unknown method 'fedot'; did you mean 'fedit'\? There are: fed"):
        methods.find("fedot")


def test_a_method_that_exchanges_gradients_must_define_exchange() -> None:
    with pytest.raises(NotImplementedError, match="'fedit' exchanges gradients but does not define"):
        methods.find("fedit")().exchange([], [], None)  # type: ignore[arg-type]


# -- methods of other packages -----------------------------------------------------------------------


def test_an_installed_package_adds_a_method(install: Install) -> None:
    install()
    assert {"halved", *FILES} == set(methods.names())
    assert "halved" in methods.with_trait("stable_parameters")
    rows = dict(entries("methods")[1])
    assert rows["halved"] == "Halved (arXiv 0000.00000): half of the mean product is merged."
    assert group_of("methods", "halved") == "other"


def test_options_of_an_installed_method_are_checked(install: Install) -> None:
    install()
    config = read("quickstart", {"method.name": "halved", "method.share": 1})
    assert config.method.options() == {"share": 1.0}
    assert '[method]\nname = "halved"\nshare = 1.0' in to_toml(config)
    with pytest.raises(ConfigError, match=r"method\.share = 0.*greater than 0"):
        read("quickstart", {"method.name": "halved", "method.share": 0})
    with pytest.raises(ConfigError, match=r"method\.shares: unknown key; did you mean 'share'"):
        read("quickstart", {"method.name": "halved", "method.shares": 1})


@pytest.mark.parametrize(
    ("declared", "name", "reason"),
    [
        ({"name": "fedit"}, "fedit", "'fedit' has the name of a built-in method"),
        ({"target": "no_such_module:Halved"}, "halved", r"\(no_such_module:Halved\) cannot be imported: Mod"),
        ({"module": "1 / 0"}, "halved", "cannot be imported: ZeroDivisionError: division by zero"),
        ({"target": "halving:Gt"}, "halved", "is not a subclass of fedsmoothlora.methods.Method"),
        ({"name": "other"}, "other", "'other' .* must have the name of its method, 'halved'"),
    ],
)
def test_a_package_whose_method_cannot_be_used_is_named(
    install: Install, declared: dict[str, str], name: str, reason: str
) -> None:
    install(**declared)
    with pytest.raises(MethodError, match=f"package fed-halving: .*{reason}"):
        methods.find(name)


def test_two_packages_with_a_method_of_one_name_are_named(install: Install) -> None:
    install()
    install(package="fed-more", target="halving:More")
    with pytest.raises(
        MethodError, match=r"package fed-\w+: method 'halved' is declared by package fed-\w+ too"
    ):
        methods.names()


@pytest.mark.slow
def test_the_command_line_lists_and_runs_an_installed_method(
    install: Install, tmp_path: Path, tiny_folder: Path
) -> None:
    folder = install()
    for part, seed in (("train", 1), ("test", 2)):
        found = textures(16, seed)
        for number, (pixels, label) in enumerate(zip(found.pixels, found.labels, strict=True)):
            image = tmp_path / part / found.classes[label] / f"{number}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(image)
    (tmp_path / "own.toml").write_text(
        f"""
        name = "own"
        model = {{source = "{tiny_folder}", image_size = 28}}
        lora = {{r = 2, alpha = 4}}
        data = {{source = "{tmp_path / "train"}", test = "{tmp_path / "test"}"}}
        partition = {{kind = "iid", clients = 2}}
        method = {{name = "halved", share = 0.25}}
        training = {{rounds = 1, steps = 1, batch_size = 4, lr = 0.02}}
        machine = {{threads = 1, device = "cpu"}}
        """
    )
    command = "from fedsmoothlora.cli import main; main()"
    assert "half of the mean product is merged" in outcome(command, "list", "methods", folder=folder)
    outcome(command, "run", str(tmp_path / "own.toml"), "--out", str(tmp_path / "run"), folder=folder)
    kept = (tmp_path / "run" / "config.toml").read_text()
    assert '[method]\nname = "halved"\nshare = 0.25' in kept
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


@pytest.mark.parametrize("method", methods.names())
def test_every_method_has_asynchronous_rounds_or_a_reason_against_them(method: str) -> None:
    traits = methods.find(method).traits
    assert traits.asynchronous != bool(traits.no_async_reason)
    table = {
        **{"name": "x", "model": {"source": "x"}, "data": {"source": "x"}},
        **{"method": {"name": method}, "participation": {"buffer": 1}},
    }
    if traits.asynchronous:
        assert read(table).method.name == method
    else:
        with pytest.raises(ConfigError, match=f"buffer = 1 does not work with method '{method}': ") as caught:
            read(table)
        assert traits.no_async_reason in str(caught.value)


def test_a_method_that_does_not_say_so_has_no_asynchronous_rounds(install: Install) -> None:
    install()
    table = {"name": "x", "model": {"source": "x"}, "data": {"source": "x"}, "method": {"name": "halved"}}
    with pytest.raises(ConfigError, match=r"'halved': it is not known .*Traits\.asynchronous"):
        read(table, {"participation.buffer": 1})


@pytest.mark.parametrize("method", methods.names())
def test_every_method_can_be_summed_under_masks_or_has_a_reason_against_it(method: str) -> None:
    traits = methods.find(method).traits
    assert traits.sums_tensors != bool(traits.no_sum_reason)
    table = {
        **{"name": "x", "model": {"source": "x"}, "data": {"source": "x"}},
        **{"method": {"name": method}, "privacy": {"secure_aggregation": True}},
    }
    if traits.sums_tensors and traits.global_model:
        assert read(table).privacy.secure_aggregation
    else:
        with pytest.raises(ConfigError, match=f"'{method}' does not work with privacy.secure_agg") as caught:
            read(table)
        assert (traits.no_sum_reason or "without a global model") in str(caught.value)


def test_a_method_that_does_not_say_so_is_not_summed_under_masks(install: Install) -> None:
    install()
    table = {"name": "x", "model": {"source": "x"}, "data": {"source": "x"}, "method": {"name": "halved"}}
    with pytest.raises(ConfigError, match=r"'halved' does not .* it is not known .*Traits\.sums_tensors"):
        read(table, {"privacy.secure_aggregation": True})
