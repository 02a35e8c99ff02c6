"""A run as a part of a page, for notebooks: its curves, its last metrics, and where its report is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedsmoothlora.reports.blocks import Note, Number, Table
from fedsmoothlora.reports.cells import cell, measured
from fedsmoothlora.reports.metrics import HIGHLIGHTS, QUALITY, metric
from fedsmoothlora.reports.reading import Metrics, RecordedRun, metrics_of
from fedsmoothlora.reports.rendering import render_overview
from fedsmoothlora.reports.sections.curves import quality_charts
from fedsmoothlora.reports.sections.header import SEEDED_NOISE

_DRAWN = (*HIGHLIGHTS, "loss", "perplexity")


def overview(
    lines: Iterable[Mapping[str, Any]], folder: Path, *, title: str = "", stopped: str | None = None
) -> str:
    """Curves of the main metrics, a table of the last ones, and a link to the report, as HTML.

    All texts are escaped. Nothing is fetched from anywhere, and no style reaches the page around it.

    Args:
        lines: the lines of ``metrics.jsonl`` so far.
        folder: the run's folder.
        title: above the curves, before the folder.
        stopped: why the run ended before its last round; None if it did not.
    """
    metrics = metrics_of(lines)
    run = RecordedRun(
        folder=folder,
        config={},
        metrics=metrics,
        environment=None,
        partition=None,
        confusion=None,
        log=None,
        evaluated_on=None,
        stopped=stopped,
    )
    return render_overview(
        " in ".join(filter(None, [title, str(folder)])),
        quality_charts(run, _DRAWN, _prefix(metrics)),
        _last_values(metrics),
        [Note(text) for text in _notes(metrics, stopped)],
        _link(folder / "report.html"),
    )


def _last_values(metrics: Metrics) -> Table:
    """The last value of every metric of quality and cost, and the round that it belongs to."""
    wanted = (*QUALITY, "train_loss", "epsilon", "bytes_up", "bytes_down", "seconds_round")
    rows: list[tuple[str, list[Number | str | None]]] = []
    for name in wanted:
        if series := metrics.server.get(name):
            last = max(series)
            rows.append((metric(name).label, [cell(series[last], name), measured(last)]))
    return Table("Last values", ["", "last value", "round"], rows)


def _notes(metrics: Metrics, stopped: str | None) -> list[str]:
    notes = [] if metrics.rounds is not None else ["No round is recorded yet."]
    if metrics.server.get("seeded_noise"):
        notes.append(SEEDED_NOISE)
    if stopped is not None:
        notes.append(f"This run ended after round {metrics.rounds}: {stopped}")
    return notes


def _link(report: Path) -> str:
    """The address of the report: relative where it is below the current folder, as notebooks need it."""
    if not report.is_file():
        return ""
    path = report.resolve()
    here = Path.cwd()
    return quote(path.relative_to(here).as_posix()) if path.is_relative_to(here) else path.as_uri()


def _prefix(metrics: Metrics) -> str:
    """A beginning for the ids of the charts: a notebook can show several runs on one page."""
    content = json.dumps([metrics.server, metrics.clients.get("train_loss")])
    return hashlib.sha256(content.encode()).hexdigest()[:8] + "-"
