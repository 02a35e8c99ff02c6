"""How clients differ: the spread of each metric, and a table of clients."""

from __future__ import annotations

import math
from statistics import fmean, pstdev

from fedsmoothlora.federation.fairness import worst_tenth
from fedsmoothlora.federation.records import TUNED
from fedsmoothlora.reports import charts, formats
from fedsmoothlora.reports.blocks import Block, Cell, Chart, Grid, Note, Table, chart
from fedsmoothlora.reports.cells import cell, finite_sum, last_value
from fedsmoothlora.reports.formats import curve_in_words
from fedsmoothlora.reports.metrics import (
    HIGHLIGHTS,
    METRICS,
    PREFIXES,
    QUALITY,
    ROUND_PHASES,
    larger_is_better,
    metric,
)
from fedsmoothlora.reports.reading import Metrics, RecordedRun, client_order

_MAIN = tuple(f"{prefix}{name}" for name in HIGHLIGHTS for prefix in ("", *PREFIXES))
_LATEST = (
    "samples",
    *(name for name in _MAIN if not name.startswith("on_test_")),
    *("loss", "own_loss", "personal_loss", "tuned_loss", "train_loss"),
)
# Metrics by which clients are compared: of the global model and of their own ones.
_COMPARED = (*(f"{prefix}{name}" for name in QUALITY for prefix in ("", *PREFIXES)), "train_loss")
_MOST_CLIENTS = 60
_ENDS = 10


def clients(run: RecordedRun) -> list[Block]:
    """Participation, the spread of the clients' metrics, and the metrics of each client."""
    metrics = run.metrics
    ids = metrics.client_ids()
    if not ids:
        return []
    compared = [name for name in _COMPARED if metrics.clients.get(name)]
    drawn = [name for name in compared if name in _MAIN] or compared[:1]
    found: list[Block] = [Note(_taking_part(metrics, len(ids)))]
    spread = _spread_table(metrics, compared)
    tables = [spread] if spread else []
    # A chart alone would leave half of the row empty.
    beside, below = (tables, []) if len(drawn) == 1 else ([], tables)
    # A metric of the end alone has no curve.
    drawn = [name for name in drawn if len(metrics.spread(name).middle) > 1 or not name.startswith(TUNED)]
    if drawn:
        found.append(Grid([*(_spread_chart(metrics, name) for name in drawn), *beside]))
    return [*found, *below, _client_table(metrics, ids, compared)]


def latest_clients(run: RecordedRun) -> list[Block]:
    """Participation and the latest metrics of each client, for a run of which only those are known."""
    metrics = run.metrics
    ids = metrics.client_ids()
    if not ids:
        return []
    compared = [name for name in _COMPARED if metrics.clients.get(name)]
    return [Note(_taking_part(metrics, len(ids))), _client_table(metrics, ids, compared)]


def _spread_chart(metrics: Metrics, name: str) -> Chart:
    spread, better = metrics.spread(name), larger_is_better(name)
    best, worst = (spread.high, spread.low) if better else (spread.low, spread.high)
    told = "; ".join(
        curve_in_words(label, series)
        for label, series in (("worst", worst), ("median", spread.middle), ("best", best))
    )
    title = f"{metric(name).title} over clients"
    figure = charts.spread_chart(spread, larger_is_better=better)
    return chart(figure, f"clients-{name}", title, f"{title} by round. {told}.", _measured_on(name))


def _measured_on(name: str) -> str:
    """A sentence on the model and the rows that a metric of clients belongs to."""
    if name in QUALITY:
        return "The global model on each client’s validation rows."
    return metric(name).explanation


def _taking_part(metrics: Metrics, clients: int) -> str:
    counts = [n for n in metrics.server.get("clients", {}).values() if math.isfinite(n)]
    sentence = f"{clients:,} client{'s' if clients != 1 else ''}"
    if counts and min(counts) == max(counts):
        sentence += f", {formats.number(counts[0])} in every round."
    elif counts:
        sentence += f", from {formats.number(min(counts))} to {formats.number(max(counts))} in a round."
    else:
        sentence += "."
    # The runs of earlier versions did not record how many of the uploads left out were refused.
    for name in ("left_out", "refused"):
        total = finite_sum(metrics.server.get(name))
        if total is not None:
            sentence += f" {METRICS[name].title}: {formats.number(total)}."
    return sentence


def _spread_table(metrics: Metrics, compared: list[str]) -> Table | None:
    """How the clients differ in each metric, in the last round that has it."""
    rows: list[tuple[str, list[Cell]]] = []
    for name in compared:
        by_client = metrics.clients[name]
        last = max(round for series in by_client.values() for round in series)
        values = {
            c: series[last] for c, series in by_client.items() if math.isfinite(series.get(last, math.nan))
        }
        if not values:
            continue
        order = sorted(values, key=lambda client: (values[client], client_order(client)))
        if larger_is_better(name):
            order.reverse()
        best, worst = order[0], order[-1]
        middle = metrics.spread(name).middle[last]
        rows.append(
            (
                metric(name).label,
                [
                    str(last),
                    cell(values[worst], name, f"client {worst}"),
                    cell(middle, name),
                    cell(values[best], name, f"client {best}"),
                    cell(fmean(values.values()), name),
                    cell(worst_tenth(values.values(), larger_is_better=larger_is_better(name)), name),
                    cell(pstdev(values.values()), name),
                ],
            )
        )
    if not rows:
        return None
    heads = ["metric", "round", "worst", "median", "best", "mean", "worst 10 %", "standard deviation"]
    return Table("Spread over clients; worst 10 %: the mean over the worst ⌈C/10⌉ of C clients", heads, rows)


def _client_table(metrics: Metrics, ids: list[str], compared: list[str]) -> Table:
    latest = [name for name in _LATEST if metrics.clients.get(name)]
    summed = [name for name in ("bytes_up",) if metrics.clients.get(name)]
    phases = [name for name in ROUND_PHASES if metrics.clients.get(name)]
    shown, caption = ids, "Every client: latest metrics and totals"
    if len(ids) > _MOST_CLIENTS and compared:
        name = compared[0]
        last = {client: series[max(series)] for client, series in metrics.clients[name].items()}
        order = sorted(
            (client for client in last if math.isfinite(last[client])),
            key=lambda client: (last[client], client_order(client)),
            reverse=not larger_is_better(name),
        )
        # Worst first.
        shown = order if len(order) <= 2 * _ENDS else order[:_ENDS] + order[-_ENDS:]
        caption = (
            f"The {_ENDS} worst and the {_ENDS} best of {len(ids):,} clients by latest {metric(name).label}"
        )
    elif len(ids) > _MOST_CLIENTS:
        shown = ids[:_MOST_CLIENTS]
        caption = f"The first {_MOST_CLIENTS} of {len(ids):,} clients"
    rows = []
    for client in shown:
        cells = [cell(last_value(metrics.clients[name].get(client, {})), name) for name in latest]
        cells += [cell(finite_sum(metrics.clients[name].get(client)), name) for name in summed]
        if phases:
            totals = [finite_sum(metrics.clients[name].get(client)) for name in phases]
            spent = [total for total in totals if total is not None]
            cells.append(cell(sum(spent) if spent else None, phases[0]))
        rows.append((client, cells))
    heads = ["client", *(metric(name).label for name in (*latest, *summed)), *(["time"] if phases else [])]
    return Table(caption, heads, rows)
