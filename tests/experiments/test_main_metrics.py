"""A comparison decides by the task's main metric, in its direction, unless another one is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedsmoothlora.config import read
from fedsmoothlora.experiments.planned_runs import PlannedRun
from fedsmoothlora.experiments.results import Results, read_results
from fedsmoothlora.tasks import find
from task_runs import KINDS, table_of, write_rows


def written(table: dict[str, Any], folder: Path, metrics: dict[str, tuple[float, float]]) -> Results:
    """The results of two methods of one round; the metrics are those of ``fedit`` and ``ffa`` at the end."""
    planned_runs = {}
    for place, label in enumerate(("fedit", "ffa")):
        config = read({**table, "method": {"name": label}, "training": {"rounds": 1}})
        planned_run = PlannedRun(f"{label}, seed 0", config, folder / label)
        planned_run.folder.mkdir(parents=True)
        lines = [
            {"round": round, "client": None, "name": name, "value": values[place] if round else 0.5}
            for round in (0, 1)
            for name, values in metrics.items()
        ]
        (planned_run.folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        planned_runs[label, 0] = planned_run
    return read_results(planned_runs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_main_metric_of_a_task_decides_in_its_direction(kind: str, tmp_path: Path) -> None:
    table = table_of(kind, tmp_path, write_rows(tmp_path, [{"text": "a"}]))
    main = find(kind)().metrics[0]
    results = written(table, tmp_path, {"loss": (0.5, 0.4), main: (0.6, 0.7), "seconds_round": (1, 1)})
    assert results.metric == main
    assert results.larger_is_better == (main != "mse")
    without = written(table, tmp_path / "more", {"loss": (0.5, 0.4)})
    assert (without.metric, without.larger_is_better) == ("loss", False)


def test_a_metric_that_was_chosen_for_the_best_round_decides(tmp_path: Path) -> None:
    table = table_of("multi-label", tmp_path, write_rows(tmp_path, [{"text": "a"}]))
    table["task"] = {"kind": "text-classification"}
    measured = {"accuracy": (0.7, 0.6), "mcc": (0.1, 0.2), "loss": (0.4, 0.5)}
    assert written(table, tmp_path / "a", measured).metric == "accuracy"
    chosen = written({**table, "checkpoint": {"best": "mcc"}}, tmp_path / "b", measured)
    assert chosen.metric == "mcc"
