"""The costs of a run: bytes and seconds."""

from __future__ import annotations

import math

from fedsmoothlora.reports import charts, formats
from fedsmoothlora.reports.blocks import Block, Grid, Table, chart
from fedsmoothlora.reports.cells import cumulative, finite_sum, in_words, measured
from fedsmoothlora.reports.formats import curve_in_words
from fedsmoothlora.reports.metrics import ROUND_PHASES
from fedsmoothlora.reports.reading import RecordedRun, Series


def communication(run: RecordedRun) -> list[Block]:
    """Bytes sent, by round and cumulative."""
    found = {
        label: run.metrics.server[name]
        for name, label in (
            ("bytes_up", "up, to the server"),
            ("bytes_down", "down, to the clients"),
            ("bytes_down_validation", "down, for validation"),
            ("bytes_down_personal", "down, for personal models"),
        )
        if run.metrics.server.get(name)
    }
    if not found:
        return []
    drawn, colours = [], ("accent", "second", "third", "fourth")
    for key, title, by_label in (
        ("bytes", "Bytes by round", found),
        ("bytes-total", "Bytes so far", {label: cumulative(series) for label, series in found.items()}),
    ):
        lines = [
            charts.Line(label, series, colour)
            for (label, series), colour in zip(by_label.items(), colours, strict=False)
        ]
        form = formats.form_of("bytes_up")
        told = "; ".join(curve_in_words(line.label, line.points, form) for line in lines)
        figure = charts.line_chart(lines, form=form, from_zero=True)
        drawn.append(chart(figure, key, title, f"{title}. {told}."))
    return [Grid(drawn)]


def time(run: RecordedRun) -> list[Block]:
    """Seconds of each phase, by round and over all rounds."""
    parts: dict[str, Series] = {}
    for name in ROUND_PHASES:
        if found := run.metrics.server.get(name) or run.metrics.summed(name):
            parts[name.removeprefix("seconds_")] = found
    if not parts:
        return []
    form = formats.seconds
    told = "; ".join(f"{label} {form(finite_sum(series) or 0)} in all" for label, series in parts.items())
    clients = [label for label in parts if label != "evaluation"]
    caption = f"Seconds of {in_words(clients)} are summed over the clients." if clients else ""
    drawn = chart(
        charts.stacked_chart(parts, ylabel="seconds"),
        "seconds",
        "Seconds by round and phase",
        f"Seconds by round and phase, stacked. {told}.",
        caption,
    )
    rows = []
    for label, series in parts.items():
        finite = [value for value in series.values() if math.isfinite(value)]
        if finite:
            statistics = (sum(finite), sum(finite) / len(finite), max(finite))
            rows.append((label, [measured(value, form) for value in statistics]))
    return [Grid([drawn, Table("Time by phase", ["phase", "total", "mean", "longest"], rows)])]
