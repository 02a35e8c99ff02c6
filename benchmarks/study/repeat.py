"""Carry out recorded runs again, and compare them with their records."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.study.driver import Study
from benchmarks.study.records import RESULTS, Record
from benchmarks.study.setting import Setting

_LOSSES = ("loss", "loss_at_start", "loss_at_end")


@dataclass(frozen=True)
class Repetition:
    """A repeated run compared with its record.

    Attributes:
        name: variant and seed.
        metric: the largest absolute difference of the deciding metric over all rounds.
        loss: the largest relative difference of the losses over all rounds.
        ended: how the two runs ended, if they ended differently; the differences are then infinite.
    """

    name: str
    metric: float
    loss: float
    ended: str = ""

    def __str__(self) -> str:
        if self.ended:
            return f"{self.name}: {self.ended}"
        return f"{self.name}: metric differs by {self.metric:.2g}, losses by {self.loss:.2g} of their value"


def repeat(
    setting: Setting,
    scenario: str,
    count: int,
    *,
    scratch: Path,
    here: Mapping[str, Any],
    only: Sequence[str] = (),
    results: Path = RESULTS,
    console: Console | None = None,
) -> tuple[list[Repetition], list[str]]:
    """Carry out ``count`` recorded runs of a scenario again, spread evenly over its finished runs.

    Returns the comparisons, and the reasons of runs that failed.

    Args:
        setting: the setting.
        scenario: its name.
        count: the number of runs.
        scratch: a folder for a copy of the records without these runs; the records stay as they are.
        here: values by dotted key that belong to this machine.
        only: labels of the variants; all unless given.
        results: the folder of all records.
        console: where progress is printed.
    """
    if not (results / setting.name / scenario).is_dir():
        return [], []
    copy = scratch / "results"
    shutil.copytree(results / setting.name / scenario, copy / setting.name / scenario, dirs_exist_ok=True)
    study = Study(setting, scenario, work=scratch / "work", results=copy, here=here, console=console)
    recorded = study.records.runs()
    finished = [
        (label, seed)
        for (label, seed), run in recorded.items()
        if run["state"] == "finished" and (not only or label in only)
    ]
    count = min(count, len(finished))
    chosen = [finished[place * len(finished) // count] for place in range(count)]
    others = [run for key, run in recorded.items() if key not in chosen]
    file = study.records.folder / "runs.jsonl"
    file.write_text("".join(json.dumps(run) + "\n" for run in others), encoding="utf-8")
    study.variants = [one for one in study.variants if one.label in {label for label, _ in chosen}]
    failed = study.run_again(chosen)
    again = study.records.runs()
    found = [
        _compared(f"{label}, seed {seed}", recorded[label, seed], again[label, seed], setting.metric)
        for label, seed in chosen
        if (label, seed) in again
    ]
    return found, failed


def _compared(name: str, record: Record, run: Record, metric: str) -> Repetition:
    before, after = (
        f"{one['state']} after {len(one['rounds'].get(metric, ())) - 1} rounds" for one in (record, run)
    )
    if before != after:
        return Repetition(name, math.inf, math.inf, f"was {before}, and is now {after}")
    pairs = {
        key: [
            (one, other)
            for one, other in zip(record["rounds"].get(key, []), run["rounds"].get(key, []), strict=True)
            if one is not None and other is not None
        ]
        for key in {metric, *_LOSSES}
    }
    return Repetition(
        name,
        metric=max((abs(one - other) for one, other in pairs[metric]), default=0.0),
        loss=max((abs(one - other) / abs(one) for key in _LOSSES for one, other in pairs[key]), default=0.0),
    )
