"""Forecasts against the bytes of real runs and against sums by hand."""

import io
import json
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from families import PREDICTABLE
from fedsmoothlora import methods
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.data.examples import BatchOrder
from fedsmoothlora.experiments.forecast import (
    MeasuredPace,
    bytes_of_run,
    forecast,
    measure,
)
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.modeling import features
from fedsmoothlora.reports.formats import seconds as readable_seconds
from fedsmoothlora.runs.pace import rows_trained, seconds_of_run
from fedsmoothlora.runs.planning import build, plan


@pytest.mark.parametrize("method", methods.names())
def test_the_forecast_bytes_are_those_of_a_run(toy_table: dict[str, Any], method: str) -> None:
    changes = {"method.name": method, "training.rounds": 5, "training.steps": 1}
    planned = plan(read(toy_table, {**changes, **PREDICTABLE.get(method, {})}))
    sent = sum(
        metric.value
        for record in run_rounds(build(planned), Callback())
        for metric in record.metrics
        if metric.client is None and metric.name in ("bytes_up", "bytes_down")
    )
    assert bytes_of_run(planned, measure(planned)) == sent


@pytest.mark.parametrize("source", ["shared", "shuffled"])
def test_gradients_that_are_exchanged_are_counted(toy_table: dict[str, Any], source: str) -> None:
    changes = {"method.gradient_aligned": source, "training.rounds": 3, "training.steps": 1}
    planned = plan(read(toy_table, changes))
    sent = sum(
        metric.value
        for record in run_rounds(build(planned), Callback())
        for metric in record.metrics
        if metric.client is None and metric.name in ("bytes_up", "bytes_down")
    )
    assert bytes_of_run(planned, measure(planned)) == sent


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 20))
def test_rows_are_those_of_the_batches(rows: int, steps: int, batch_size: int) -> None:
    batches = BatchOrder(rows, batch_size, torch.Generator()).take(steps)
    assert rows_trained(rows, steps, batch_size) == sum(map(len, batches))


PACE = MeasuredPace(
    loading=1000.0,
    start=10.0,
    row=1.0,
    upload=0.5,
    aggregate=7.0,
    evaluated_row=0.01,
    up=(0, 0),
    down=(0, 0, 0),
)


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        # 96 rows of 3 clients, 2 rounds; 64 test rows before and after each.
        ({}, 1000 + 2 * (3 * 10.5 + 96 + 7) + 3 * 64 * 0.01),
        ({"training.epochs": 2}, 1000 + 2 * (3 * 10.5 + 2 * 96 + 7) + 3 * 64 * 0.01),
        ({"training.steps": 2, "training.batch_size": 4}, 1000 + 2 * (3 * 10.5 + 3 * 8 + 7) + 3 * 64 * 0.01),
        ({"partition.kind": "iid", "participation.clients": 1}, 1000 + 2 * (10.5 + 32 + 7) + 3 * 64 * 0.01),
        # Every client's own model on the test set.
        ({"method.name": "local"}, 1000 + 2 * (3 * 10.5 + 96 + 7) + (64 + 2 * 3 * 64) * 0.01),
    ],
)
def test_seconds_are_the_sum_of_what_a_run_does(
    toy_table: dict[str, Any], changes: dict[str, Any], seconds: float
) -> None:
    planned = plan(read(toy_table, {"training.rounds": 2, **changes}))
    assert seconds_of_run(planned, PACE) == pytest.approx(seconds)


def test_rows_for_validation_are_measured_and_not_trained_on(toy_table: dict[str, Any]) -> None:
    planned = plan(
        read(toy_table, {"training.rounds": 2, "data.validation": 0.25, "evaluation.clients": True})
    )
    kept = sum(map(len, planned.validation.values()))
    assert kept == pytest.approx(24, abs=2)
    wanted = 1000 + 2 * (3 * 10.5 + 96 - kept + 7) + (3 * (64 + kept) + 2 * kept) * 0.01
    assert seconds_of_run(planned, PACE) == pytest.approx(wanted)


def test_every_part_of_the_pace_is_measured(toy_table: dict[str, Any]) -> None:
    pace = measure(plan(read(toy_table)))
    for part in ("loading", "start", "row", "upload", "aggregate", "evaluated_row"):
        assert 0 < getattr(pace, part) < 60, part


def test_calibration_that_counts_takes_none_of_the_timed_steps(
    toy_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[int] = []

    class Counting(Callback):
        def on_client_begin(self, client: str, steps: int) -> None:
            timed.append(steps)

    monkeypatch.setattr(import_module("fedsmoothlora.experiments.forecast"), "Callback", Counting)
    changes = {"method.name": "fedsmoothlora", "method.calibration_batches": 2}
    measure(plan(read(toy_table, changes)))
    measure(plan(read(toy_table, {**changes, "training.count_calibration": True})))
    assert len(timed) == 4
    assert len(set(timed)) == 1


def test_it_prints_runs_bytes_and_a_readable_time(toy_table: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=200)
    config = read(toy_table, {"method.name": "fedit"})
    found = forecast({"mine": (config, 4), "done": (config, 0)}, 2, console)
    assert found.keys() == {"mine"}
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "done" not in said
    assert f"about {readable_seconds(2 * found['mine'].seconds)} with 2 jobs" in said
    assert "hours" not in said
    assert "4 runs" in said


def test_features_that_are_evaluated_once_count_for_no_run(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSMOOTHLORA_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "texts.jsonl"
    rows = [{"text": f"say {i % 7}", "label": "ab"[i % 2]} for i in range(20)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {
        "name": "texts",
        "model": {"source": str(tiny_bert), "head": "lora"},
        "lora": {"r": 1, "alpha": 4, "target_modules": ["classifier"]},
        "data": {"source": str(source), "validation": 0.2},
        "task": {"kind": "text-classification", "prompt": "{text}", "frozen_features": "mean"},
        "partition": {"kind": "iid", "clients": 2},
        "method": {"name": "fedit"},
        "training": {"rounds": 2, "batch_size": 8, "lr": 0.02},
        "machine": {"threads": 1, "device": "cpu"},
    }
    evaluated: list[float] = []
    evaluate = features.features

    def slow(*given: Any, **more: Any) -> Any:
        evaluated.append(1000.0)
        return evaluate(*given, **more)

    monkeypatch.setattr(features, "features", slow)
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(evaluated))
    monkeypatch.setattr(import_module("fedsmoothlora.experiments.forecast"), "time", clock)
    assert measure(plan(read(table))).loading < 1000
    assert evaluated


def test_the_cost_of_a_process_s_first_calls_is_not_counted_for_each_run(
    toy_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forecasts = import_module("fedsmoothlora.experiments.forecast")
    config, calls = read(toy_table), []
    real = forecasts.measure

    def counted(planned: Any) -> Any:
        calls.append(planned.config.method.name)
        return real(planned)

    monkeypatch.setattr(forecasts, "measure", counted)
    other = read(toy_table, {"method.name": "ffa"})
    forecasts.forecast({"one": (config, 2), "two": (other, 2)}, 1, Console(file=io.StringIO()))
    assert calls == [config.method.name, config.method.name, "ffa"]
