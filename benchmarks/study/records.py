"""The records of finished runs, one line of JSON each. They are committed and never run again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments.page import loss_jump
from fedsmoothlora.reports.reading import Metrics
from fedsmoothlora.storage.files import write_text

RESULTS = Path(__file__).parent / "results"

Record = dict[str, Any]

# Metrics of the server, and metrics of clients, which are averaged, by round.
_OF_SERVER = (
    *("accuracy", "loss", "perplexity", "exact_match", "bytes_up", "bytes_down", "seconds_round"),
    *("start_distance", "update_norm", "update_cosine", "merged_effective_rank", "mean_of_clients"),
)
_OF_CLIENTS = (
    *("loss_at_start", "loss_at_end", "start_error", "ga_kept", "start_gradient_cosine", "seconds_start"),
)
_DIGITS = 6


class Records:
    """The records of one scenario: its trials and its runs.

    Args:
        folder: the folder of the records.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def belong_to(self, scenario: Mapping[str, Any]) -> None:
        """Write the settings that all runs share, by dotted key, or compare them with the recorded ones.

        Raises ``ConfigError`` if the records belong to other settings.
        """
        file = self.folder / "scenario.json"
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(scenario, indent=2, sort_keys=True) + "\n")
            return
        recorded = json.loads(file.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(scenario))
        if other := sorted(key for key in {*recorded, *wanted} if recorded.get(key) != wanted.get(key)):
            key = other[0]
            raise ConfigError(
                f"{self.folder}: the records were run with {key} = {recorded.get(key)!r}, but the setting "
                f"has {wanted.get(key)!r}: restore it, or give the scenario another name"
            )

    def trials(self) -> dict[tuple[str, int, int], Record]:
        """The trials by label, number and seed."""
        found = _read(self.folder / "trials.jsonl")
        return {(one["variant"], one["trial"], one["seed"]): one for one in found}

    def runs(self) -> dict[tuple[str, int], Record]:
        """The runs by label and seed."""
        return {(one["variant"], one["seed"]): one for one in _read(self.folder / "runs.jsonl")}

    def add_trial(self, record: Record) -> None:
        """Append a trial."""
        _append(self.folder / "trials.jsonl", record)

    def add_run(self, record: Record) -> None:
        """Append a run."""
        _append(self.folder / "runs.jsonl", record)


def by_round(metrics: Metrics, metric: str) -> dict[str, list[float | None]]:
    """The metrics that the study keeps, each a list by finished rounds, starting with 0.

    They include the ``metric`` that decides, and the ``loss_jump`` of the clients.
    """
    rounds = range((metrics.rounds or 0) + 1)
    found: dict[str, list[float | None]] = {}
    for name in dict.fromkeys((metric, *_OF_SERVER)):
        if series := metrics.server.get(name):
            found[name] = [_short(series.get(k)) for k in rounds]
    for name in _OF_CLIENTS:
        if of_clients := metrics.clients.get(name):
            values = [[s[k] for s in of_clients.values() if k in s] for k in rounds]
            found[name] = [_short(fmean(one)) if one else None for one in values]
    if jumps := loss_jump(metrics):
        found["loss_jump"] = [_short(jumps.get(k)) for k in rounds]
    return found


def _short(value: float | None) -> float | None:
    return float(f"{value:.{_DIGITS}g}") if value is not None and math.isfinite(value) else None


def _read(file: Path) -> list[Record]:
    """All complete lines; a killed process may leave an incomplete one."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _append(file: Path, record: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as out:
        end = out.seek(0, os.SEEK_END)
        if end:
            out.seek(0)
            whole = out.read().rpartition(b"\n")
            out.truncate(len(whole[0]) + len(whole[1]))
        out.write((json.dumps(record, allow_nan=False) + "\n").encode())
        out.flush()
        os.fsync(out.fileno())
