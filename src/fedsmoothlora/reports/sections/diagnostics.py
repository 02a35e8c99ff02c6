"""Metrics that explain a run, each with its meaning."""

from __future__ import annotations

from fedsmoothlora.reports import charts, formats
from fedsmoothlora.reports.blocks import Block, Grid, Note, chart
from fedsmoothlora.reports.formats import curve_in_words
from fedsmoothlora.reports.metrics import metric
from fedsmoothlora.reports.reading import RecordedRun

_MOST_DIAGNOSTICS = 24


def diagnostics(run: RecordedRun) -> list[Block]:
    metrics = run.metrics
    server = sorted(name for name, series in metrics.server.items() if series and _is_diagnostic(name))
    clients = sorted(name for name, series in metrics.clients.items() if series and _is_diagnostic(name))
    drawn = []
    for number, name in enumerate(server[:_MOST_DIAGNOSTICS]):
        line = charts.Line(name, metrics.server[name])
        drawn.append(
            chart(
                charts.line_chart([line], width=charts.NARROW),
                f"diagnostic-{number}",
                metric(name).title,
                f"{curve_in_words(metric(name).label, line.points, formats.number)}.",
                metric(name).explanation,
            )
        )
    for number, name in enumerate(clients[: _MOST_DIAGNOSTICS - len(drawn)]):
        spread = metrics.spread(name)
        drawn.append(
            chart(
                charts.line_chart([], band=spread, band_label="clients", width=charts.NARROW),
                f"client-diagnostic-{number}",
                f"{metric(name).title} over clients",
                f"{curve_in_words(f'{metric(name).label}, median', spread.middle, formats.number)}.",
                metric(name).explanation,
            )
        )
    if not drawn:
        return []
    hidden = len(server) + len(clients) - len(drawn)
    note = [Note(f"{hidden} more are in metrics.jsonl.")] if hidden else []
    return [Grid(drawn, small=True), *note]


def _is_diagnostic(name: str) -> bool:
    return metric(name).group == "diagnostics"
