"""The time of a run from one measured batch of the real model."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from typer.testing import CliRunner

from fedsmoothlora.cli.app import app
from fedsmoothlora.config import read, to_toml
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.runs import check as check_module
from fedsmoothlora.runs import pace as pace_module
from fedsmoothlora.runs.check import check
from fedsmoothlora.runs.pace import Pace, measure_batch, seconds_of_round, seconds_of_run
from fedsmoothlora.runs.planning import plan

PACE = Pace(loading=1000.0, start=10.0, row=1.0, upload=0.5, aggregate=7.0, evaluated_row=0.01)


def test_a_round_is_what_the_run_repeats(toy_table: dict[str, Any]) -> None:
    planned = plan(read(toy_table))
    assert seconds_of_round(planned, PACE) == pytest.approx(3 * 10.5 + 96 + 7 + 0.64)
    assert seconds_of_run(planned, PACE) == pytest.approx(1000 + 3 * seconds_of_round(planned, PACE) + 0.64)


def test_clients_that_train_at_once_share_the_time(toy_table: dict[str, Any]) -> None:
    planned = plan(read(toy_table, {"machine.jobs": 2}))  # 3 clients: two rounds of two processes
    assert seconds_of_round(planned, PACE) == pytest.approx(2 * (10.5 + 32) + 7 + 0.64)


@pytest.mark.parametrize("method", ["fedsmoothlora", "fedit", "full", "local"])
def test_a_batch_of_the_real_model_is_measured(toy_table: dict[str, Any], method: str) -> None:
    planned = plan(read(toy_table, {"method.name": method}))
    measured = measure_batch(planned, limit=60.0)  # reached by no machine
    assert measured.rows == 8
    pace = measured.pace
    assert 0 < measured.seconds < 5
    assert pace.row == pytest.approx(measured.seconds / 8)
    assert 0 < pace.evaluated_row < 5
    # Calibration reads batches of training rows: 8 of a full batch by default, 2 in the toy's table.
    assert pace.start == pytest.approx(16 * pace.row if method == "fedsmoothlora" else 0)


def test_measuring_changes_no_random_numbers(toy_table: dict[str, Any]) -> None:
    planned = plan(read(toy_table))
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    measure_batch(planned, limit=0.1)
    assert torch.equal(torch.rand(4), wanted)


def test_a_slow_batch_is_measured_by_some_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pace_module.time, "perf_counter", lambda: now[0])

    def run(rows: NDArray[np.int64]) -> None:
        now[0] += 0.5 * len(rows)

    assert pace_module._measured(run, np.arange(64), 2.0) == (2, 1.0)
    assert pace_module._measured(run, np.arange(64), 100.0) == (64, 32.0)
    assert pace_module._measured(run, np.arange(64), 0.1) == (1, 0.5)
    assert pace_module._measured(run, np.arange(2), 60.0) == (2, 1.0)


def test_too_little_memory_is_an_error_with_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(rows: NDArray[np.int64]) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(ConfigError, match=r"does not fit into memory .*training\.accumulation"):
        pace_module._measured(run, np.arange(64), 2.0)


def said(table: dict[str, Any], changes: dict[str, Any] | None = None) -> str:
    written = io.StringIO()
    check(read(table, changes), Console(file=written, width=200), measure=True)
    return written.getvalue()


def test_check_forecasts_a_round_and_the_whole_run(
    toy_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = pace_module.MeasuredBatch(pace=PACE, rows=8, seconds=8.0)
    monkeypatch.setattr(check_module, "measure_batch", lambda planned: measured)
    text = said(toy_table)
    assert "time: about 2 min 15 s a round and 23 min 26 s in all 3 rounds" in text
    assert "measured: 8 s forward and backward of 8 rows" in text
    one = pace_module.MeasuredBatch(pace=PACE, rows=1, seconds=1.0)
    monkeypatch.setattr(check_module, "measure_batch", lambda planned: one)
    single = said(toy_table, {"training.rounds": 1})
    assert "in all 1 round\n" in single
    assert "forward and backward of 1 row, on this machine" in single
    assert "calibration:" not in text  # 30 of 127 s
    assert "batch_clients" not in text
    monkeypatch.setattr(check_module, "measure_batch", lambda planned: measured)
    together = {"machine.batch_clients": 3, "machine.threads": 1}
    assert "one client after the other; machine.batch_clients = 3 takes less" in said(toy_table, together)
    costly = pace_module.MeasuredBatch(
        pace=Pace(loading=1, start=40, row=1, upload=0, aggregate=0, evaluated_row=1), rows=8, seconds=8
    )
    monkeypatch.setattr(check_module, "measure_batch", lambda planned: costly)
    assert "calibration: 56% of the clients' time: method.calibration_batches = 2" in said(toy_table)


def test_check_measures_unless_it_is_told_not_to(
    toy_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    measured = pace_module.MeasuredBatch(pace=PACE, rows=8, seconds=8.0)

    def measure(planned: Any) -> Any:
        asked.append("measured")
        return measured

    monkeypatch.setattr(check_module, "measure_batch", measure)
    file = tmp_path / "toy.toml"
    file.write_text(to_toml(read(toy_table)))
    with_time = CliRunner().invoke(app, ["check", str(file)])
    assert "time: about" in with_time.output
    without = CliRunner().invoke(app, ["check", str(file), "--no-measure"])
    assert "time: about" not in without.output
    assert asked == ["measured"]
