"""Comparisons of tiny runs: paired, resumable, and clear about failed runs."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from PIL import Image
from rich.console import Console

from conftest import textures
from fedsmoothlora import cli
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.errors import InterruptedRunError, StateError
from fedsmoothlora.experiments import execution, planned_runs, worker_pool
from fedsmoothlora.experiments.compare import FIRST_TUNING_SEED, compare, dry_run
from fedsmoothlora.experiments.tuning import dry_run as dry_run_of_tuning
from fedsmoothlora.experiments.tuning import tune
from fedsmoothlora.federation.settings import MachineSettings
from fedsmoothlora.runs import session
from fedsmoothlora.runs.session import run


def silent() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def table(toy_table: dict[str, Any]) -> dict[str, Any]:
    toy_table["training"] |= {"rounds": 2, "steps": 2}
    return toy_table


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if not line["name"].startswith("seconds")]


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def test_runs_of_a_seed_have_data_start_and_budget_in_common(table: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    compare(table, ["fedit", "hot: fedsmoothlora training.lr=0.05"], out=out, seeds=2, console=silent())

    def of(label: str, seed: int, name: str) -> bytes:
        return (out / "runs" / label / f"seed-{seed}" / name).read_bytes()

    for name in ("partition.json", "head.safetensors"):
        for seed in (0, 1):
            assert of("fedit", seed, name) == of("hot", seed, name)
        assert of("fedit", 0, name) != of("fedit", 1, name)
    for seed in (0, 1):
        first, other = (metrics(out / "runs" / label / f"seed-{seed}") for label in ("fedit", "hot"))
        at_start = [[line for line in lines if line["round"] == 0] for lines in (first, other)]
        assert at_start[0] == at_start[1]
        samples = [[line for line in lines if line["name"] == "samples"] for lines in (first, other)]
        assert samples[0] == samples[1]
    configs = [read(out / "runs" / label / "seed-1" / "config.toml") for label in ("fedit", "hot")]
    assert [config.training.lr for config in configs] == [0.02, 0.05]
    assert configs[0].data == configs[1].data
    assert configs[0].training.rounds == configs[1].training.rounds == 2
    assert all(config.evaluation.diagnostics for config in configs)


def test_a_metric_that_the_task_does_not_measure_is_refused_before_the_first_run(
    table: dict[str, Any], tmp_path: Path
) -> None:
    wrong = r"--metric entity_f1: is not measured .* choose one of accuracy, loss"
    chosen: dict[str, Any] = {"seeds": 1, "metric": "entity_f1", "console": silent()}
    for command in (compare, dry_run):
        with pytest.raises(ConfigError, match=wrong):
            command(table, ["fedit"], out=tmp_path / "out", **chosen)
        for name in ("acuracy", "update_norm"):  # a typing error, and a metric of the server
            with pytest.raises(ConfigError, match=f"--metric {name}: is not measured"):
                command(table, ["fedit"], out=tmp_path / "out", **{**chosen, "metric": name})
    validated, grid = {**table, "data": {**table["data"], "validation": 0.2}}, {"training.lr": [0.01]}
    for tuning in (tune, dry_run_of_tuning):
        with pytest.raises(ConfigError, match=wrong):
            tuning(validated, ["fedit"], grid, out=tmp_path / "tuned", **chosen)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "tuned").exists()


@pytest.mark.report
def test_a_planned_run_gives_the_same_metrics_as_a_single_run(table: dict[str, Any], tmp_path: Path) -> None:
    compare(table, ["fedit"], out=tmp_path / "out", seeds=2, console=silent())
    folder = tmp_path / "out" / "runs" / "fedit" / "seed-1"
    alone = run(table, {"method.name": "fedit", "seed": 1}, out=tmp_path / "alone", console=silent())
    ours = [line for line in metrics(folder) if line["name"] in {one["name"] for one in alone.metrics}]
    assert ours == metrics(tmp_path / "alone")
    # An ordinary folder: what was left out is written when someone wants it.
    assert not (folder / "model").exists()
    run(resume=folder, console=silent())
    assert (folder / "model" / "model.safetensors").is_file()
    assert (folder / "report.html").is_file()


def test_finished_runs_are_not_run_again_and_methods_and_seeds_can_be_added(
    table: dict[str, Any], tmp_path: Path, begun: list[str]
) -> None:
    out = tmp_path / "out"
    compare(table, ["fedit"], out=out, seeds=1, console=silent())
    before = (out / "runs" / "fedit" / "seed-0" / "metrics.jsonl").read_bytes()
    assert begun == ["toy: fedit, seed 0"]
    done = compare(table, ["fedit", "ffa"], out=out, seeds=2, console=silent())
    assert sorted(begun[1:]) == ["toy: fedit, seed 1", "toy: ffa, seed 0", "toy: ffa, seed 1"]
    assert (out / "runs" / "fedit" / "seed-0" / "metrics.jsonl").read_bytes() == before
    assert [row["state"] for row in rows(out / "runs.csv")] == ["finished"] * 4
    again = compare(table, ["fedit", "ffa"], out=out, seeds=2, baseline="ffa", console=silent())
    assert len(begun) == 4
    assert again.results.difference("fedit").mean == -done.results.difference("ffa").mean


def test_a_comparison_that_names_a_role_of_layers_is_continued(
    table: dict[str, Any], tmp_path: Path, begun: list[str]
) -> None:
    """Runs record names of layers in place of roles; the comparison keeps the role."""
    table["lora"]["target_modules"] = "mlp"
    out = tmp_path / "out"
    run_folder = out / "runs" / "fedit" / "seed-0"
    compare(table, ["fedit"], out=out, seeds=1, console=silent())
    assert read(run_folder / "config.toml").lora.target_modules == ("fc1", "fc2")
    assert read(tomllib.loads((out / "comparison.toml").read_text())["config"]).lora.target_modules == (
        "mlp",
    )
    whole = metrics(run_folder)
    # As a run that was killed in round 2.
    (run_folder / "checkpoints" / "0002.json").unlink()
    lines = (run_folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_folder / "metrics.jsonl").write_text("".join(one for one in lines if json.loads(one)["round"] < 2))
    compare(table, ["fedit"], out=out, seeds=1, console=silent())
    assert begun == ["toy: fedit, seed 0"] * 2
    assert metrics(run_folder) == whole
    table["lora"]["target_modules"] = "attention"
    with pytest.raises(ConfigError, match=r"lora\.target_modules differs"):
        compare(table, ["fedit"], out=out, seeds=1, console=silent())


@pytest.mark.parametrize(
    ("methods", "overrides", "key"),
    [
        (["fedit"], {"training.lr": 0.5}, "training.lr"),
        (["fedit"], {"data.train_rows": 90}, "data.train_rows"),
        (["fedit: fedit training.lr=0.5"], {}, "variant.fedit.training.lr"),
        (["fedit: ffa"], {}, "variant.fedit.method.name"),
    ],
)
def test_another_comparison_is_refused_by_key(
    table: dict[str, Any], tmp_path: Path, methods: list[str], overrides: dict[str, Any], key: str
) -> None:
    out = tmp_path / "out"
    first = ["fedit: fedit training.lr=0.01"] if "variant" in key else ["fedit"]
    compare(table, first, out=out, seeds=1, console=silent())
    before = (out / "comparison.toml").read_bytes()
    with pytest.raises(ConfigError, match=re.escape(key)):
        compare(table, methods, overrides, out=out, seeds=1, console=silent())
    assert (out / "comparison.toml").read_bytes() == before


def test_threads_are_divided_when_the_folder_begins_and_stay(
    table: dict[str, Any], tmp_path: Path, begun: list[str]
) -> None:
    out = tmp_path / "out"
    table["machine"]["threads"] = 4
    compare(table, ["fedit"], out=out, seeds=1, jobs=2, console=silent())
    compare(table, ["fedit", "ffa"], out=out, seeds=1, jobs=1, console=silent())
    assert len(begun) == 2
    for label in ("fedit", "ffa"):
        assert read(out / "runs" / label / "seed-0" / "config.toml").machine.threads == 2


@pytest.mark.parametrize(
    ("methods", "options", "said"),
    [
        (
            ["fedit", "ffa"],
            {"baseline": "flora"},
            "--baseline flora: is none of the variants: fedit, ffa",
        ),
        (["fedit"], {"seeds": 0}, "must be at least 1"),
        (["fedit"], {"overrides": {"seed": FIRST_TUNING_SEED}}, "are for tuning"),
        (["fedit"], {"overrides": {"method.gamma": 3}}, "fedit: "),
        (["big: fedsmoothlora lora.r=17"], {}, "lora.r"),
        (["fedit", "big: fedsmoothlora lora.r=17"], {}, "lora.r"),
    ],
)
def test_invalid_arguments_are_refused_before_any_run(
    table: dict[str, Any],
    tmp_path: Path,
    begun: list[str],
    methods: list[str],
    options: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        compare(table, methods, out=tmp_path / "out", console=silent(), **{"seeds": 1, **options})
    assert begun == []
    assert not (tmp_path / "out").exists()


def test_a_run_that_was_killed_before_it_had_a_configuration_begins_anew(
    table: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compare(table, ["fedit"], out=out, seeds=1, console=silent())
    folder = out / "runs" / "fedit" / "seed-0"
    before = metrics(folder)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "partition.json").write_text("{}")
    assert compare(table, ["fedit"], out=out, seeds=1, console=silent()).failed == {}
    assert metrics(folder) == before


def test_a_terminal_shows_bars_and_one_line_for_each_run(table: dict[str, Any], tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    compare(table, ["fedit", "ffa"], out=tmp_path / "out", seeds=1, console=console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "━" in said
    for label in ("fedit", "ffa"):
        assert f"{label}, seed 0: round 2/2" in said
        assert f"{label}, seed 0: round 1/2" not in said


def test_more_threads_than_processors_give_a_warning() -> None:
    assert execution.too_many_threads(1, 2, 2) is None
    assert "2 jobs of 2 threads are more than this machine's 3" in str(execution.too_many_threads(2, 2, 3))
    machine = MachineSettings(threads=4)
    assert [execution.side_by_side(machine, jobs).threads for jobs in (1, 2, 3, 8)] == [4, 2, 1, 1]


def test_parallel_clients_inside_parallel_runs_are_refused(table: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"machine\.jobs = 2.*\(--jobs\)"):
        compare(table, ["fedit"], {"machine.jobs": 2}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(table: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        compare(table, ["fedit"], out=tmp_path, console=silent())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_failed_run_does_not_stop_others_and_is_tried_again(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: Any, **options: Any) -> Any:
        if config.name == "toy: fedit, seed 0":
            raise OSError("no space left on device")
        return run(config, **options)

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(planned_runs, "run", failing)
        done = compare(table, ["fedit", "ffa"], out=out, seeds=2, console=silent())
    assert done.failed == {"fedit, seed 0": "OSError: no space left on device"}
    states = {(row["variant"], row["seed"]): row["state"] for row in rows(out / "runs.csv")}
    assert states.pop(("fedit", "0")) == "failed"
    assert set(states.values()) == {"finished"}
    assert "no space left on device" in done.page.read_text()
    assert compare(table, ["fedit", "ffa"], out=out, seeds=2, console=silent()).failed == {}
    assert {row["state"] for row in rows(out / "runs.csv")} == {"finished"}


def test_runs_that_were_reduced_to_their_records_stay_finished(
    table: dict[str, Any], tmp_path: Path, begun: list[str]
) -> None:
    """docs/operations.md: the records of a finished run suffice for comparisons."""
    out = tmp_path / "out"
    compare(table, ["fedit"], out=out, seeds=1, console=silent())
    folder = out / "runs" / "fedit" / "seed-0"
    for name in ("updates", "checkpoints", "clients", "model"):
        shutil.rmtree(folder / name, ignore_errors=True)
    before = (folder / "metrics.jsonl").read_bytes()
    done = compare(table, ["fedit", "ffa"], out=out, seeds=1, console=silent())
    assert [name.rpartition(": ")[2] for name in begun] == ["fedit, seed 0", "ffa, seed 0"]
    assert done.results.finals("fedit").keys() == {0}
    with pytest.raises(StateError, match="reduced to its records"):
        run(resume=folder, console=silent())
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_that_was_stopped_while_personal_models_are_measured_is_continued(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table["data"]["validation"] = 0.25
    overrides = {"evaluation.personal_steps": 1}

    def stopped(*_: Any) -> Any:
        raise InterruptedRunError("stopped after the last round")

    arguments: dict[str, Any] = {"out": tmp_path / "out", "seeds": 1, "console": silent()}
    with monkeypatch.context() as patched:
        patched.setattr(session, "personal_at_end", stopped)
        with pytest.raises(InterruptedRunError):
            compare(table, ["fedit"], overrides, **arguments)
    done = compare(table, ["fedit"], overrides, **arguments)
    assert done.results.personal("fedit", "tuned_") is not None


def test_a_dry_run_of_a_begun_folder_keeps_its_threads_and_refuses_other_settings(
    table: dict[str, Any], tmp_path: Path
) -> None:
    table["machine"] = {**table.get("machine", {}), "threads": 2}
    compare(table, ["fedit"], out=tmp_path / "out", seeds=1, jobs=2, console=silent())
    written = (tmp_path / "out" / "comparison.toml").read_bytes()
    left = dry_run(table, ["fedit", "ffa"], out=tmp_path / "out", seeds=1, console=silent())
    assert {label: one.runs for label, one in left.items()} == {"ffa": 1}
    with pytest.raises(ConfigError, match=r"lora\.r differs"):
        dry_run(table, ["fedit"], {"lora.r": 1}, out=tmp_path / "out", seeds=1, console=silent())
    assert (tmp_path / "out" / "comparison.toml").read_bytes() == written


def test_a_diverged_run_is_a_result_and_is_not_tried_again(
    table: dict[str, Any], tmp_path: Path, begun: list[str]
) -> None:
    out = tmp_path / "out"
    del table["training"]["max_grad_norm"]
    methods = ["fedit", "wild: fedit training.lr=1e30"]
    done = compare(table, methods, out=out, seeds=1, console=silent())
    assert done.failed == {}
    assert [row["state"] for row in rows(out / "runs.csv")] == ["finished", "diverged"]
    assert done.results.verdict("wild") == "no pair"
    assert "wild, seed 0: diverged" in done.page.read_text()
    compare(table, methods, out=out, seeds=1, console=silent())
    assert len(begun) == 2


def test_methods_without_a_global_model_measure_their_clients_on_their_own_rows(
    table: dict[str, Any], tmp_path: Path
) -> None:
    table["data"]["validation"] = 0.25
    done = compare(table, ["fedit", "local"], out=tmp_path / "out", seeds=1, console=silent())
    found = [done.results.clients(label) for label in ("fedit", "local")]
    assert [one and one.metric for one in found] == ["accuracy", "own_accuracy"]
    lines = metrics(tmp_path / "out" / "runs" / "fedit" / "seed-0")
    last = sorted(
        line["value"]
        for line in lines
        if (line["round"], line["name"]) == (2, "accuracy") and line["client"] is not None
    )
    assert found[0] is not None
    assert (found[0].worst, found[0].best, found[0].clients) == (last[0], last[-1], 3)


def test_a_dry_run_writes_nothing_and_counts_what_is_left(table: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    console = silent()
    found = dry_run(table, ["fedit", "ffa"], out=out, seeds=2, jobs=2, console=console)
    assert not out.exists()
    assert {label: one.runs for label, one in found.items()} == {"fedit": 2, "ffa": 2}
    assert "4 runs" in console.file.getvalue()  # type: ignore[attr-defined]
    compare(table, ["fedit"], out=out, seeds=1, console=silent())
    left = dry_run(table, ["fedit", "ffa"], out=out, seeds=1, console=silent())
    assert {label: one.runs for label, one in left.items()} == {"ffa": 1}


def test_a_dry_run_says_that_clients_trained_together_take_less(
    table: dict[str, Any], tmp_path: Path
) -> None:
    console = silent()
    table["machine"] = {**table.get("machine", {}), "batch_clients": 2}
    dry_run(table, ["fedit"], out=tmp_path / "out", seeds=1, console=console)
    assert "one client after the other" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_process_that_dies_fails_its_runs_with_its_exit_message(
    table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys; sys.stdin.readline(); print('killed by a test', file=sys.stderr); sys.exit(3)"
    monkeypatch.setattr(worker_pool, "_WORKER", [sys.executable, "-c", code])
    done = compare(table, ["fedit", "ffa"], out=tmp_path / "out", seeds=1, jobs=2, console=silent())
    assert done.failed == dict.fromkeys(
        ("fedit, seed 0", "ffa, seed 0"), "its process ended with code 3: killed by a test"
    )
    assert done.results.target is None


Main = Callable[..., int]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    """The command line in this process; its exit code."""

    def call(*arguments: str | Path) -> int:
        monkeypatch.setattr(sys, "argv", ["fedsmoothlora", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return call


def test_the_command_compares_and_prints_results(
    main: Main, table: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "toy.toml"
    file.write_text(tomli_w.dumps(table))
    chosen = tmp_path / "chosen.toml"
    chosen.write_text('[[variant]]\nlabel = "slow"\nmethod.name = "fedit"\ntraining.lr = 0.001\n')
    out = tmp_path / "out"
    command = [
        "compare",
        file,
        "--methods",
        f"fedit,{chosen}",
        "--variant",
        "zeta0: fedsmoothlora method.zeta=0",
    ]
    assert main(*command, "--seeds", "1", "--out", out, "--set", "training.steps=1", "--dry-run") == 0
    assert "3 runs" in capsys.readouterr().out
    assert not out.exists()
    assert main(*command, "--seeds", "1", "--out", out, "--set", "training.steps=1") == 0
    said = capsys.readouterr().out
    assert "zeta0, seed 0: round 2/2" in said
    for name in ("comparison.csv", "runs.csv", "comparison.md", "comparison.html", "comparison.toml"):
        assert (out / name).is_file(), name
    assert [row["variant"] for row in rows(out / "comparison.csv")] == ["fedit", "slow", "zeta0"]
    assert read(out / "runs" / "slow" / "seed-0" / "config.toml").training.steps == 1
    assert main(*command, "--seeds", "1", "--out", out, "--set", "training.steps=2") == 2
    assert "training.steps" in capsys.readouterr().err


# -- in processes of their own: data that they find on disk ---------------------------------------


@pytest.fixture
def on_disk(toy_table: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    for name, images in (("train", textures(48, 1)), ("test", textures(32, 2))):
        for number, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
            folder = tmp_path / "images" / name / images.classes[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(pixels)).save(folder / f"{number:03d}.png")
    images_folder = tmp_path / "images"
    toy_table["data"] = {"source": str(images_folder / "train"), "test": str(images_folder / "test")}
    toy_table["training"] |= {"rounds": 2, "steps": 2}
    return toy_table


@pytest.mark.slow
def test_two_jobs_give_the_same_bits_as_one(on_disk: dict[str, Any], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    done = [
        compare(on_disk, ["fedit", "ffa"], out=out, seeds=2, jobs=jobs, console=silent())
        for out, jobs in ((one, 1), (two, 2))
    ]
    assert done[0].failed == done[1].failed == {}
    for label in ("fedit", "ffa"):
        for seed in (0, 1):
            folder = Path("runs") / label / f"seed-{seed}"
            assert metrics(one / folder) == metrics(two / folder)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.release)])
def test_ctrl_c_stops_after_the_current_client_and_the_same_command_continues(
    on_disk: dict[str, Any], tmp_path: Path, jobs: int
) -> None:
    on_disk["training"] |= {"rounds": 30}
    file = tmp_path / "toy.toml"
    file.write_text(tomli_w.dumps(on_disk))
    command = [sys.executable, "-m", "fedsmoothlora", "compare", str(file), "--methods", "fedit,ffa"]
    command += ["--seeds", "1", "--jobs", str(jobs), "--out", str(tmp_path / "out")]
    first = tmp_path / "out" / "runs" / "fedit" / "seed-0" / "checkpoints" / "0001.json"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 100
        while not first.is_file() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=100)
    assert process.returncode == 130, said + errors
    assert "the same command continues" in errors
    assert (tmp_path / "out" / "comparison.html").is_file()
    assert not (first.parent / "0030.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert again.returncode == 0, again.stdout + again.stderr
    whole = run(on_disk, {"method.name": "fedit"}, out=tmp_path / "whole", console=silent())
    known = {one["name"] for one in whole.metrics}
    ours = [line for line in metrics(tmp_path / "out" / "runs" / "fedit" / "seed-0") if line["name"] in known]
    assert ours == metrics(tmp_path / "whole")


@pytest.mark.slow
def test_a_variant_that_ends_early_counts_as_finished_with_its_last_round(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    frozen = {**toy_table["training"], "lr": 1e-12, "rounds": 4, "patience": 1}

    compared = compare(
        {**toy_table, "training": frozen}, methods=["fedit"], seeds=2, out=tmp_path / "out", console=silent()
    )

    for one in compared.results.runs.values():
        assert one.state == "finished"
        assert one.final("accuracy") is not None
        assert one.metrics.rounds < 4
