"""Metrics that explain a run, each with its meaning."""

from __future__ import annotations

from fedsmoothlora.reports import charts, formats
from fedsmoothlora.reports.blocks import Block, Chart, Grid, Note, Table, chart
from fedsmoothlora.reports.cells import measured
from fedsmoothlora.reports.formats import curve_in_words
from fedsmoothlora.reports.metrics import metric
from fedsmoothlora.reports.reading import Metrics, RecordedRun, Series

_MOST_DIAGNOSTICS = 24
_FEW_ROUNDS = 10


def diagnostics(run: RecordedRun) -> list[Block]:
    """A chart of every diagnostic of the server, and of the spread of every diagnostic of the clients."""
    metrics = run.metrics
    server = sorted(name for name, series in metrics.server.items() if series and _is_diagnostic(name))
    clients = sorted(name for name, series in metrics.clients.items() if series and _is_diagnostic(name))
    drawn = [
        *(_of_server(metrics, name, number) for number, name in enumerate(server)),
        *(_of_clients(metrics, name, number) for number, name in enumerate(clients)),
    ][:_MOST_DIAGNOSTICS]
    if not drawn:
        return []
    hidden = len(server) + len(clients) - len(drawn)
    note = [Note(f"{hidden} more are in metrics.jsonl.")] if hidden else []
    # A chart alone would leave half of the row empty.
    if len(drawn) == 1:
        series = metrics.server[server[0]] if server else metrics.spread(clients[0]).middle
        return [Grid([*drawn, _table((server or clients)[0], series)]), *note]
    return [Grid(drawn), *note]


def _is_diagnostic(name: str) -> bool:
    return metric(name).group == "diagnostics"


def _of_server(metrics: Metrics, name: str, number: int) -> Chart:
    line = charts.Line(metric(name).label, metrics.server[name])
    return chart(
        charts.line_chart([line]),
        f"diagnostic-{number}",
        metric(name).title,
        f"{curve_in_words(metric(name).label, line.points, formats.number)}.",
        _meaning(name),
    )


def _of_clients(metrics: Metrics, name: str, number: int) -> Chart:
    spread = metrics.spread(name)
    return chart(
        charts.line_chart([], band=spread, band_label="clients"),
        f"client-diagnostic-{number}",
        f"{metric(name).title} over clients",
        f"{curve_in_words(f'{metric(name).label}, median', spread.middle, formats.number)}.",
        _meaning(name),
    )


def _meaning(name: str) -> str:
    return metric(name).description or f"Recorded as {name} by code outside the package."


def _table(name: str, series: Series) -> Table:
    rows = [(str(round), [measured(value)]) for round, value in sorted(series.items())]
    return Table("Latest rounds", ["round", metric(name).label], rows[-_FEW_ROUNDS:])
