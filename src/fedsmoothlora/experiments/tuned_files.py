"""The files and tables of a tuning: every trial, and the chosen settings."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsmoothlora.experiments.tables import spreadsheet_cell
from fedsmoothlora.experiments.trials import Tuned
from fedsmoothlora.experiments.variants import Variant, to_toml
from fedsmoothlora.reports.metrics import larger_is_better
from fedsmoothlora.storage.files import write_text

CHOSEN = "chosen.toml"


def write_tuned(tuned: Tuned, variants: Sequence[Variant]) -> None:
    """Write all trials and, for `compare`, the chosen settings with the record of their tuning."""
    write_text(tuned.folder / "tuned.json", json.dumps(_as_json(tuned), indent=2) + "\n")
    write_text(tuned.folder / "tuned.csv", _as_csv(tuned))
    own = {variant.label: variant.overrides for variant in variants}
    best = [
        Variant(label, {**own[label], **trial.overrides}, tuned.records[label])
        for label, trial in tuned.chosen.items()
    ]
    write_text(tuned.folder / CHOSEN, to_toml(best))


def print_tuned(tuned: Tuned, console: Console) -> None:
    """Print all trials, the chosen ones and what is doubtful about them."""
    console.print(_table(tuned))
    for label, record in tuned.records.items():
        for key in record.at_edge:
            value = tuned.chosen[label].overrides[key]
            _print(
                console,
                f"{label}: the chosen {key} = {value} is at the edge of the grid; try values beyond it",
                style="yellow",
            )
    for trial in tuned.trials:
        for seed, state in trial.states.items():
            if state == "exploded":
                reason = trial.reasons[seed]
                _print(
                    console,
                    f"{trial.variant}, trial {trial.number}: {reason}; it is never chosen",
                    style="yellow",
                )
    for variant in dict.fromkeys(trial.variant for trial in tuned.trials):
        if variant not in tuned.chosen:
            left = any(trial.is_left for trial in tuned.trials if trial.variant == variant)
            reason = "runs are left; give the same command again" if left else "no trial has a score"
            _print(console, f"{variant}: {reason}, so no settings are chosen", style="red")
    for name, reason in tuned.failed.items():
        _print(console, f"failed: {name}: {reason}", style="red")
    _print(console, f"chosen: {tuned.folder / CHOSEN}")


def _table(tuned: Tuned) -> Table:
    table = Table(
        *("variant", "trial", "settings", f"validation {tuned.metric}", ""), box=None, pad_edge=False
    )
    for trial in tuned.trials:
        is_best = tuned.chosen.get(trial.variant) is trial
        score = ", ".join(sorted(set(trial.states.values()))) if trial.score is None else f"{trial.score:.4f}"
        settings = settings_in_words(trial.overrides)
        table.add_row(trial.variant, str(trial.number), settings, score, "chosen" if is_best else "")
    return table


def _print(console: Console, text: str, style: str | None = None) -> None:
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _as_json(tuned: Tuned) -> dict[str, Any]:
    return {
        "metric": tuned.metric,
        "larger_is_better": larger_is_better(tuned.metric),
        "measured_on": "validation rows of the clients",
        "trials_of_each_variant": len(tuned.trials) // len({trial.variant for trial in tuned.trials}),
        "trials": [
            {**asdict(trial), "score": trial.score, "chosen": tuned.chosen.get(trial.variant) is trial}
            for trial in tuned.trials
        ],
        "at_edge": tuned.at_edge,
    }


def _as_csv(tuned: Tuned) -> str:
    keys = sorted({key for trial in tuned.trials for key in trial.overrides})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "trial", *keys, tuned.metric, "chosen", "states"])
    for trial in tuned.trials:
        score = "" if trial.score is None else trial.score
        values = [trial.overrides.get(key, "") for key in keys]
        is_best = tuned.chosen.get(trial.variant) is trial
        row = [trial.variant, trial.number, *values, score, is_best, " ".join(trial.states.values())]
        writer.writerow(map(spreadsheet_cell, row))
    return text.getvalue()


def settings_in_words(overrides: Mapping[str, Any]) -> str:
    """``KEY=VALUE KEY=VALUE``."""
    return " ".join(f"{key}={value}" for key, value in overrides.items())
