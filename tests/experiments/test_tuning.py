"""Tuning: the same number of trials of each method, on its own rows and seeds, never on the test set."""

import csv
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from conftest import textures
from fedsmoothlora import cli
from fedsmoothlora.config import read
from fedsmoothlora.data import registry
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments import planned_runs, results, tuning
from fedsmoothlora.experiments.compare import FIRST_TUNING_SEED, compare, prepare
from fedsmoothlora.experiments.grid import grid_of, parse_grid, parse_grids, settings_to_try
from fedsmoothlora.experiments.tuning import Tuned, dry_run, tune
from fedsmoothlora.experiments.tuning_record import record_of, status_of
from fedsmoothlora.experiments.variants import collect, named, read_variants
from fedsmoothlora.reports.reading import Metrics
from fedsmoothlora.runs.session import run


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def table(toy_table: dict[str, Any]) -> dict[str, Any]:
    toy_table["training"] |= {"rounds": 2, "steps": 4}
    return toy_table


def scores(tuned: Tuned) -> list[float | None]:
    return [trial.score for trial in tuned.trials]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_score_is_the_metric_on_the_clients_validation_rows(table: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    grid = {"training.lr": [0.001, 0.05]}
    tuned = tune(table, ["fedit"], grid, out=out, metric="loss", console=silent())
    for number, trial in enumerate(tuned.trials, start=1):
        folder = out / "runs" / "fedit" / f"trial-{number:02d}" / f"seed-{FIRST_TUNING_SEED}"
        config = read(folder / "config.toml")
        assert (config.seed, config.data.validation) == (FIRST_TUNING_SEED, 0.2)
        assert config.training.lr == grid["training.lr"][number - 1]
        rows = json.loads((folder / "partition.json").read_text())["clients"]
        found = lines(folder)
        trained = {line["client"]: line["value"] for line in found if line["name"] == "samples"}
        losses = {
            line["client"]: line["value"]
            for line in found
            if (line["round"], line["name"]) == (2, "loss") and line["client"] is not None
        }
        kept = {client: sum(counts) - trained[client] for client, counts in rows.items()}
        assert sum(kept.values()) == pytest.approx(0.2 * 96, abs=2)
        mean = sum(losses[client] * kept[client] for client in kept) / sum(kept.values())
        assert trial.score == pytest.approx(mean)
    best = min(tuned.trials, key=lambda trial: trial.score or 0)
    assert tuned.chosen == {"fedit": best}
    assert tuned.at_edge == {"fedit": ["training.lr"]}


def test_the_test_set_is_not_used(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"training.lr": [0.001, 0.05]}
    methods = ["fedit", "local"]  # with and without a global model
    first = tune(table, methods, grid, out=tmp_path / "one", metric="loss", console=silent())
    other = SimpleNamespace(NAME="textures", load=lambda: (textures(96, 1), textures(20, 77)))
    monkeypatch.setattr(registry, "packaged", lambda folder: {"textures": other})
    again = tune(table, methods, grid, out=tmp_path / "two", metric="loss", console=silent())
    assert None not in scores(first)
    assert scores(first) == scores(again)


def test_compare_uses_the_chosen_settings(table: dict[str, Any], tmp_path: Path) -> None:
    grid = {"training.lr": [0.001, 0.05], "method.gamma": [32, 128], "fedit:training.lr": [0.01, 0.02, 0.04]}
    tuned = tune(table, ["fedsmoothlora", "fedit"], grid, out=tmp_path / "tuned", trials=3, console=silent())
    counts = [trial.variant for trial in tuned.trials]
    assert (counts.count("fedsmoothlora"), counts.count("fedit")) == (3, 3)
    chosen = tmp_path / "tuned" / "chosen.toml"
    done = compare(table, [chosen], out=tmp_path / "compared", seeds=1, console=silent())
    assert all(done.results.record(method) for method in ("fedsmoothlora", "fedit"))
    for method in ("fedsmoothlora", "fedit"):
        config = done.results.runs[method, 0].config
        assert config.training.lr == tuned.chosen[method].overrides["training.lr"]
    gamma = tuned.chosen["fedsmoothlora"].overrides["method.gamma"]
    assert done.results.runs["fedsmoothlora", 0].config.method.gamma == gamma
    written = json.loads((tmp_path / "tuned" / "tuned.json").read_text())
    assert [trial["score"] for trial in written["trials"]] == scores(tuned)
    assert sum(trial["chosen"] for trial in written["trials"]) == 2
    assert written["trials_of_each_variant"] == 3
    rows = list(csv.DictReader(io.StringIO((tmp_path / "tuned" / "tuned.csv").read_text())))
    assert [float(row["accuracy"]) for row in rows] == scores(tuned)
    assert {row["training.lr"] for row in rows if row["variant"] == "fedit"} == {"0.01", "0.02", "0.04"}


def test_a_trial_that_diverges_counts_and_is_never_chosen(table: dict[str, Any], tmp_path: Path) -> None:
    del table["training"]["max_grad_norm"]
    out = tmp_path / "out"
    tuned = tune(table, ["fedit"], {"training.lr": [1e30, 0.01]}, out=out, console=silent())
    assert [list(trial.states.values()) for trial in tuned.trials] == [["diverged"], ["finished"]]
    assert tuned.trials[0].score is None
    assert tuned.chosen["fedit"].number == 2
    assert "could be used" in next(iter(tuned.trials[0].reasons.values()))
    alone = tune(table, ["fedit"], {"training.lr": [1e30]}, out=tmp_path / "alone", console=silent())
    assert alone.chosen == {}


def test_a_trial_whose_loss_explodes_is_marked_and_never_chosen(
    table: dict[str, Any], tmp_path: Path
) -> None:
    table["training"]["max_grad_norm"] = 10.0  # so that weights become large and stay finite
    console = silent()
    tuned = tune(table, ["fedit"], {"training.lr": [30.0, 0.01]}, out=tmp_path / "out", console=console)
    assert [list(trial.states.values()) for trial in tuned.trials] == [["exploded"], ["finished"]]
    assert tuned.trials[0].score is None
    assert tuned.trials[0].scores == {}
    assert tuned.chosen["fedit"].number == 2
    assert "fedit, trial 1: the loss exploded: " in console.file.getvalue()  # type: ignore[attr-defined]
    written = json.loads((tmp_path / "out" / "tuned.json").read_text())
    assert written["trials"][0]["states"] == {str(FIRST_TUNING_SEED): "exploded"}


def test_nothing_is_chosen_while_a_run_is_left(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: Any, **options: Any) -> Any:
        if config.training.lr == 0.02:
            raise OSError("no space left on device")
        return run(config, **options)

    arguments: dict[str, Any] = {"out": tmp_path / "out", "console": silent()}
    grid = {"training.lr": [0.01, 0.02]}
    with monkeypatch.context() as patched:
        patched.setattr(planned_runs, "run", failing)
        tuned = tune(table, ["fedit"], grid, **arguments)
    assert tuned.chosen == {}
    assert "fedit: runs are left; give the same command again" in arguments["console"].file.getvalue()
    assert set(tune(table, ["fedit"], grid, **arguments).chosen) == {"fedit"}


def test_a_trial_in_which_clients_own_models_diverge_has_no_score(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a global model, the metric would be the mean over the other clients."""
    kept = results.read_metrics

    def two_left_out(folder: Path) -> Metrics:
        found = kept(folder)
        if "trial-02" in str(folder):
            found.server["left_out"] = {found.rounds or 0: 2.0}
        return found

    monkeypatch.setattr(results, "read_metrics", two_left_out)
    grid = {"training.lr": [0.01, 0.02]}
    tuned = tune(table, ["local"], grid, out=tmp_path / "out", console=silent())
    assert [trial.score is None for trial in tuned.trials] == [False, True]
    assert "2 of the clients could not be used" in next(iter(tuned.trials[1].reasons.values()))
    other = tune(table, ["fedit"], grid, out=tmp_path / "fedit", console=silent())
    assert all(trial.score is not None for trial in other.trials)


def test_the_chosen_file_records_how_it_was_tuned_and_compare_reads_it(
    table: dict[str, Any], tmp_path: Path
) -> None:
    grid = {"training.lr": [0.001, 0.05]}
    table["training"]["rounds"] = 1
    tune(table, ["fedit", "ffa"], grid, out=tmp_path / "tuned", seeds=2, metric="loss", console=silent())
    file = tmp_path / "tuned" / "chosen.toml"
    variants = {variant.label: variant for variant in read_variants(file)}
    record = variants["fedit"].tuning
    assert record is not None
    assert (record.trials, record.seeds) == (2, (FIRST_TUNING_SEED, FIRST_TUNING_SEED + 1))
    assert (record.metric, record.grid, record.at_edge) == ("loss", grid, ("training.lr",))
    edited = replace(variants["ffa"], overrides={**variants["ffa"].overrides, "training.lr": 0.03})
    compared = [variants["fedit"], edited, named("flora")]
    tuning = prepare(table, compared, out=tmp_path / "out", seeds=1, jobs=1, begin=False).tuning
    assert tuning["fedit"].record == record
    reasons = [tuning[label].reason for label in ("ffa", "flora")]
    tuned_with = variants["ffa"].overrides["training.lr"]
    assert reasons == [
        f"training.lr was {tuned_with} during tuning and is 0.03 here",
        "no tuning is recorded",
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"seed": 7, "name": "other", "machine.threads": 2, "evaluation.diagnostics": True}, ""),
        ({"data.validation": 0.2}, ""),
        ({"training.rounds": 9}, "training.rounds was 2 during tuning and is 9 here"),
        ({"data.train_rows": 50}, "data.train_rows was not set during tuning and is 50 here"),
        ({"partition.kind": "iid"}, "partition.alpha was 1.0 during tuning and is not set here"),
        ({"lora.r": 1}, "lora.r was 2 during tuning and is 1 here"),
        ({"method.name": "ffa"}, "method.name was fedit during tuning and is ffa here"),
    ],
)
def test_settings_count_as_tuned_for_the_configuration_of_the_tuning_only(
    table: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    config = read(table, {"method.name": "fedit"})
    options: dict[str, Any] = {"seeds": [1], "metric": "loss", "score": 0.5, "at_edge": []}
    record = record_of(config, [{"training.lr": 0.01}, {"training.lr": 0.02}], **options)
    status = status_of(record, read(table, {"method.name": "fedit", **changes}))
    assert (status.record == record) == (reason == "")
    assert status.reason == reason
    alone = record_of(config, [{"training.lr": 0.02}], **options)
    assert status_of(alone, config).reason == "tuning tried one setting only"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("tuning = 3", "tuning must be the table that `fedsmoothlora tune` writes"),
        ("tuning.trials = 0", "tuning.trials = 0"),
        ("tuning.trails = 3", "did you mean 'trials'"),
        ("tuning.trials = 3", "tuning.seeds is missing"),
    ],
)
def test_a_damaged_tuning_record_is_refused_with_file_variant_and_key(
    tmp_path: Path, line: str, said: str
) -> None:
    file = tmp_path / "chosen.toml"
    file.write_text(f'[[variant]]\nmethod.name = "fedit"\n{line}\n')
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        read_variants(file)
    assert "chosen.toml: [[variant]] 'fedit'" in str(error.value)


def test_finished_trials_are_not_run_again_and_others_are_refused(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def counted(config: Any, **options: Any) -> Any:
        begun.append(config.name)
        return run(config, **options)

    monkeypatch.setattr(planned_runs, "run", counted)
    out = tmp_path / "out"
    grid = {"training.lr": [0.01, 0.02]}
    first = tune(table, ["fedit"], grid, out=out, console=silent())
    again = tune(table, ["fedit"], grid, out=out, console=silent())
    assert scores(first) == scores(again)
    assert len(begun) == 2
    tune(table, ["fedit"], grid, out=out, seeds=2, console=silent())
    assert [name[-1] for name in begun] == ["0", "0", "1", "1"]
    with pytest.raises(ConfigError, match=r"trial\.fedit\.trial-02\.training_lr"):
        tune(table, ["fedit"], {"training.lr": [0.01, 0.03]}, out=out, console=silent())


def test_a_dry_run_writes_nothing(table: dict[str, Any], tmp_path: Path) -> None:
    found = dry_run(
        table,
        ["fedit", "ffa"],
        {"training.lr": [0.01, 0.02]},
        out=tmp_path / "out",
        seeds=3,
        console=silent(),
    )
    assert {method: one.runs for method, one in found.items()} == {"fedit": 6, "ffa": 6}
    assert not (tmp_path / "out").exists()


@given(
    st.lists(st.floats(0.001, 1), min_size=1, max_size=6, unique=True),
    st.lists(st.integers(1, 500), min_size=1, max_size=4, unique=True),
    st.data(),
)
def test_every_method_gets_the_same_number_of_trials_from_its_grid(
    rates: list[float], gammas: list[int], data: st.DataObject
) -> None:
    trials = data.draw(st.integers(1, len(rates)))
    grid = {"training.lr": rates, "method.gamma": gammas}
    found = settings_to_try(collect(["fedsmoothlora", "fedit"]), grid, trials, 0)
    assert [len(one) for one in found.values()] == [trials, trials]
    for one in found.values():
        assert len({tuple(sorted(point.items())) for point in one}) == trials
    assert all(point.keys() == {"training.lr", "method.gamma"} for point in found["fedsmoothlora"])
    assert all(point.keys() == {"training.lr"} for point in found["fedit"])
    assert found == settings_to_try(collect(["fedsmoothlora", "fedit"]), grid, trials, 0)
    whole = settings_to_try(collect(["fedsmoothlora"]), grid, len(rates) * len(gammas), 0)["fedsmoothlora"]
    assert len({tuple(point.items()) for point in whole}) == len(rates) * len(gammas)


def test_a_methods_own_grid_replaces_the_common_grid() -> None:
    grid = {"fedit:training.lr": [3.0], "training.lr": [1.0, 2.0]}
    assert grid_of(named("fedit"), grid) == {"training.lr": [3.0]}
    assert grid_of(named("ffa"), grid) == {"training.lr": [1.0, 2.0]}


def test_a_variants_grid_replaces_its_methods_and_keys_that_it_sets_are_not_tried() -> None:
    variants = collect(
        ["still: fedsmoothlora method.zeta=0", "pinned: fedsmoothlora method.gamma=64", "fedsmoothlora"]
    )
    grid = {
        "training.lr": [1.0, 2.0, 3.0, 4.0],
        "fedsmoothlora:training.lr": [1.0, 2.0],
        "method.gamma": [32, 128],
        "pinned:training.lr": [5.0, 6.0, 7.0, 8.0],
    }
    found = settings_to_try(variants, grid, None, 0)
    assert [point["training.lr"] for point in found["pinned"]] == [5.0, 6.0, 7.0, 8.0]
    assert all(point.keys() == {"training.lr"} for point in found["pinned"])
    assert found["still"] == found["fedsmoothlora"]
    assert [(point["training.lr"], point["method.gamma"]) for point in found["still"]] == [
        (1.0, 32),
        (1.0, 128),
        (2.0, 32),
        (2.0, 128),
    ]


def test_a_chosen_variant_keeps_its_own_settings(table: dict[str, Any], tmp_path: Path) -> None:
    variant = "still: fedsmoothlora method.zeta=0 method.gamma=64"
    tuned = tune(table, [variant], {"training.lr": [0.001, 0.05]}, out=tmp_path / "tuned", console=silent())
    assert list(tuned.chosen) == ["still"]
    (chosen,) = read_variants(tmp_path / "tuned" / "chosen.toml")
    assert chosen.label == "still"
    assert chosen.overrides == {
        "method.name": "fedsmoothlora",
        "method.zeta": 0,
        "method.gamma": 64,
        **tuned.chosen["still"].overrides,
    }


def test_grids_are_read_as_toml_values() -> None:
    assert parse_grid("training.lr=0.001, 1e-2") == ("training.lr", [0.001, 0.01])
    assert parse_grid("fedsmoothlora:method.start=exact,truncated") == (
        "fedsmoothlora:method.start",
        ["exact", "truncated"],
    )


def test_a_grid_whose_key_is_given_twice_is_refused() -> None:
    given = ["training.lr=0.001", "fedit:training.lr=0.1"]
    assert parse_grids(given) == {"training.lr": [0.001], "fedit:training.lr": [0.1]}
    with pytest.raises(ConfigError, match=r"--grid training\.lr is given twice"):
        parse_grids([*given, "training.lr=0.01"])


def test_a_grid_without_one_of_its_values_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--grid 'training.lr=1,,2': a value is missing"):
        parse_grids(["training.lr=1,,2"])


@pytest.mark.parametrize(
    ("methods", "grid", "trials", "said"),
    [
        (["fedit"], {"training.lr": [1, 2]}, 3, "the grid of fedit has 2 points"),
        (["fedit"], {"training.lr": [1, 2]}, 0, "must be at least 1"),
        (["fedit"], {"method.gama": [1, 2]}, 1, "no method has the key method.gama"),
        (["fedit"], {"fedit:method.gamma": [1, 2]}, 1, "fedit has no such key"),
        (["fedit"], {"fedid:training.lr": [1, 2]}, 1, "'fedid' is neither a method"),
        (["fedit"], {"method.gamma": [1, 2]}, 1, "no key applies to fedit"),
        (["fedit"], {"training.lr": [1, 1]}, 1, "give at least one value, and no value twice"),
        (["fedit"], {"training.rounds": [1, 2]}, 1, "sets training.rounds"),
        (["fedit"], {"seed": [1, 2]}, 1, "sets seed"),
        (["fedid"], {"training.lr": [1, 2]}, 1, "did you mean 'fedit'"),
    ],
)
def test_an_invalid_grid_is_refused(
    methods: list[str], grid: dict[str, list[Any]], trials: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        settings_to_try(collect(methods), grid, trials, 0)


def test_the_command_tunes_and_prints_the_choice(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "toy.toml"
    file.write_text(tomli_w.dumps(table))
    command = ["tune", str(file), "--method", "fedit,ffa", "--grid", "training.lr=0.01,0.05"]
    command += ["--out", str(tmp_path / "out"), "--trials", "2"]
    monkeypatch.setattr(sys, "argv", ["fedsmoothlora", *command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    said = capsys.readouterr().out
    assert said.count("chosen") >= 3
    assert "is at the edge of the grid" in said
    assert (tmp_path / "out" / "chosen.toml").is_file()


@pytest.mark.parametrize(("chosen", "code"), [({"still": 1}, 0), ({}, 1)])
def test_the_command_fails_only_where_a_variant_has_no_choice(
    monkeypatch: pytest.MonkeyPatch, chosen: dict[str, int], code: int
) -> None:
    tuned = SimpleNamespace(trials=[SimpleNamespace(variant="still")], chosen=chosen, failed={})
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: tuned)
    command = ["tune", "quickstart", "--variant", "still: fedsmoothlora method.zeta=0"]
    command += ["--grid", "training.lr=0.01,0.1", "--out", "unused"]
    monkeypatch.setattr(sys, "argv", ["fedsmoothlora", *command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert (stop.value.code or 0) == code
