"""`fedsmoothlora runs` lists runs and their disk."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import FinishedRuns
from fedsmoothlora import cli, export
from fedsmoothlora.reports.report import write_report
from fedsmoothlora.storage.disk import runs_below


def listed(folder: Path) -> str:
    done = CliRunner().invoke(cli.app, ["runs", str(folder)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def finished(finished_runs: FinishedRuns, toy_table: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    changes = {"training.rounds": 1, "training.steps": 1}
    return lambda name: finished_runs.copy(toy_table, changes, tmp_path / name)


def test_runs_are_listed_with_their_state_and_disk(finished: Callable[..., Path], tmp_path: Path) -> None:
    small, large = finished("runs/small"), finished("runs/nested/large")
    (large / "clients" / "more").write_bytes(bytes(9_000_000))
    (small / "checkpoints" / "0001.json").unlink()  # as if it was killed
    (tmp_path / "runs" / "notes").mkdir()

    found = runs_below(tmp_path / "runs")
    assert [run.folder for run in found] == [large, small]
    assert [(run.state, run.round, run.rounds) for run in found] == [("finished", 1, 1), ("unfinished", 0, 1)]
    for run in found:
        files = [path for path in run.folder.rglob("*") if path.is_file()]
        assert run.size == sum(path.stat().st_size for path in files)
        assert all(run.sizes[part] for part in ("updates", "checkpoints", "clients", "model", "records"))

    output = listed(tmp_path / "runs").splitlines()
    titles = "run state rounds size updates checkpoints clients model records"
    assert output[0].split() == titles.split()
    assert output[1].startswith("nested/large")
    assert "unfinished" in output[2]
    assert output[-1].startswith("2 runs, ")


def test_a_run_is_listed_alone_and_a_damaged_one_too(finished: Callable[..., Path]) -> None:
    folder = finished("alone")
    (folder / "config.toml").write_text("damaged = ")
    assert "1 of ?" in listed(folder)


def test_a_folder_without_runs_is_said_to_have_none(tmp_path: Path) -> None:
    assert "no runs" in listed(tmp_path)


@pytest.mark.slow
def test_parts_that_a_finished_run_can_do_without(finished: Callable[..., Path], tmp_path: Path) -> None:
    """As docs/operations.md says: the report needs records only, an export no states of clients."""
    folder = finished("run")
    shutil.rmtree(folder / "clients")
    export(folder, as_="adapter", out=tmp_path / "adapter")
    for part in ("updates", "checkpoints", "model"):
        shutil.rmtree(folder / part)
    assert write_report(folder).is_file()
