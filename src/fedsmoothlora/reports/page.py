"""A report's page: its sections, each made of what was measured, or left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

from fedsmoothlora.reports import charts, formats
from fedsmoothlora.reports.blocks import (
    Block,
    Cell,
    Chart,
    Columns,
    Folded,
    Grid,
    Highlight,
    Log,
    Note,
    Number,
    Page,
    Pairs,
    Section,
    Table,
    chart,
)
from fedsmoothlora.reports.formats import curve_in_words
from fedsmoothlora.reports.metrics import METRICS, PREFIXES, QUALITY, metric
from fedsmoothlora.reports.reading import Metrics, RecordedRun, Series, client_order, larger_is_better
from fedsmoothlora.reports.rendering import render

# The parts of a round, in their order; the first ones are summed over the clients.
_PHASES = tuple(name for name, one in METRICS.items() if one.group == "time" and name != "seconds_round")
_HIGHLIGHTS = ("accuracy", "exact_match", "loss", "perplexity")
_LATEST = ("samples", "accuracy", "own_accuracy", "loss", "own_loss", "train_loss")
# How clients' models are compared: the global model and their own ones by each quality metric.
_MEASURES = (*(f"{prefix}{name}" for name in QUALITY for prefix in ("", *PREFIXES)), "train_loss")
_MOST_LINES, _MOST_POINTS = 20, 2_000
_MOST_CLIENTS = 60
_ENDS = 10
_MOST_ROUNDS = 500
_MOST_DIAGNOSTICS = 24
_MOST_MISTAKES = 10


def page(run: RecordedRun) -> str:
    """The whole page as HTML."""
    sections = [
        Section(key, title, blocks)
        for key, title, write in (
            ("curves", "Learning curves", _curves),
            ("clients", "Clients", _clients),
            ("partition", "Partition", _partition),
            ("bytes", "Bytes", _bytes),
            ("seconds", "Time", _seconds),
            ("confusion", "Confusion matrix", _confusion),
            ("diagnostics", "Diagnostics", _diagnostics),
            ("settings", "Settings", _settings),
            ("environment", "Environment", _environment),
            ("log", "Log", _log),
        )
        if (blocks := write(run))
    ]
    name = str(run.config.get("name") or run.folder.name)
    facts = {
        "Method": _setting(run, "method", "name"),
        "Model": _setting(run, "model", "source"),
        "Data": _setting(run, "data", "source"),
    }
    return render(
        Page(
            title=f"{name}: report of a run",
            heading=name,
            description=str(run.config.get("description") or ""),
            facts={key: value for key, value in facts.items() if value is not None},
            highlights=_highlights(run),
            sections=sections,
            footer=_footer(run),
        )
    )


def _highlights(run: RecordedRun) -> list[Highlight]:
    server = run.metrics.server
    found = [
        Highlight(f"Final {METRICS[name].label}", *_final(server[name], formats.form_of(name)))
        for name in _HIGHLIGHTS
        if server.get(name)
    ]
    rounds, planned = run.metrics.rounds, _setting(run, "training", "rounds")
    if rounds is not None:
        found.append(
            Highlight("Rounds finished", _measured(rounds), f"of {planned} planned" if planned else "")
        )
    for name in ("bytes_up", "bytes_down"):
        if total := _total(server.get(name)):
            value = _measured(total, formats.form_of(name))
            found.append(Highlight(METRICS[name].title, value, "by all clients together"))
    times = {
        word: total
        for name, word in (("seconds_round", "rounds"), ("seconds_evaluation", "evaluation"))
        if (total := _total(server.get(name))) is not None
    }
    if times:
        value = _measured(sum(times.values()), formats.seconds)
        found.append(Highlight("Total time", value, _and(list(times))))
    return found


def _final(series: Series, form: Callable[[float], str]) -> tuple[Number, str]:
    """The last value, and its change since round 0."""
    last = max(series)
    change = series[last] - series[0] if 0 in series and last > 0 else math.nan
    if not math.isfinite(change):
        return _measured(series[last], form), f"after round {last}"
    sign = "+" if change > 0 else "−" if change < 0 else "±"
    return _measured(series[last], form), f"{sign}{form(abs(change))} since round 0"


def _curves(run: RecordedRun) -> list[Block]:
    server, metrics = run.metrics.server, run.metrics
    drawn: list[Chart] = []
    for name in QUALITY:
        if not server.get(name) and not (name == "loss" and _has_training_loss(metrics)):
            continue
        title = METRICS[name].title
        lines = [charts.Line(metrics.measured_model, server[name])] if server.get(name) else []
        caption = "On the test set. Round 0 is before any training." if lines else ""
        options: dict[str, Any] = {}
        if name == "loss" and _has_training_loss(metrics):
            losses = metrics.clients.get("train_loss", {})
            if 0 < len(losses) <= _MOST_LINES and sum(map(len, losses.values())) <= _MOST_POINTS:
                options = {
                    "behind": {
                        client: _ordered(losses[client]) for client in sorted(losses, key=client_order)
                    },
                    "behind_label": "training, clients",
                }
            elif losses:
                options = {"band": metrics.spread("train_loss"), "band_label": "training"}
            if server.get("train_loss"):
                lines.append(charts.Line("training, mean", server["train_loss"], "second"))
            caption = "Loss on the test set, and in training on the clients’ own rows."
        figure = charts.line_chart(lines, **options)
        described = (
            "; ".join(curve_in_words(line.label, line.points) for line in lines) or "clients’ training loss"
        )
        drawn.append(chart(figure, name, title, f"{title} by round. {described}.", caption))
    return [Grid(drawn), _every_round(metrics)] if drawn else []


def _has_training_loss(metrics: Metrics) -> bool:
    return bool(metrics.server.get("train_loss") or metrics.clients.get("train_loss"))


def _every_round(metrics: Metrics) -> Folded:
    """Exact numbers of every round, folded away."""
    wanted = (*QUALITY, "train_loss", "bytes_up", "bytes_down", "seconds_round")
    names = [name for name in wanted if metrics.server.get(name)]
    rounds = sorted({round for name in names for round in metrics.server[name]})
    step = max(1, math.ceil(len(rounds) / _MOST_ROUNDS))
    # The last round is always among them.
    shown = rounds[::-step][::-1]
    caption = "Every round" if step == 1 else f"Every {step}th round"
    rows = [(str(round), [_cell(metrics.server[name].get(round), name) for name in names]) for round in shown]
    columns = ["round", *(metric(name).label for name in names)]
    return Folded("Numbers of every round", Table(caption, columns, rows))


def _clients(run: RecordedRun) -> list[Block]:
    metrics = run.metrics
    ids = metrics.client_ids()
    if not ids:
        return []
    measures = [name for name in _MEASURES if metrics.clients.get(name)]
    drawn = [name for name in measures if "accuracy" in name] or measures[:1]
    found: list[Block] = [Note(_taking_part(metrics, len(ids)))]
    if drawn:
        found.append(Grid([_spread_chart(metrics, name) for name in drawn]))
    if spread := _spread_table(metrics, measures):
        found.append(spread)
    return [*found, _client_table(metrics, ids, measures)]


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
    """Which model is measured on which rows."""
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
        total = _total(metrics.server.get(name))
        if total is not None:
            sentence += f" {METRICS[name].title}: {formats.number(total)}."
    return sentence


def _spread_table(metrics: Metrics, measures: list[str]) -> Table | None:
    """Worst, median and best client, each measure in the last round that has it."""
    rows: list[tuple[str, list[Cell]]] = []
    for name in measures:
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
                    _cell(values[worst], name, f" (client {worst})"),
                    _cell(middle, name),
                    _cell(values[best], name, f" (client {best})"),
                ],
            )
        )
    if not rows:
        return None
    return Table("Spread over clients", ["measure", "round", "worst", "median", "best"], rows)


def _client_table(metrics: Metrics, ids: list[str], measures: list[str]) -> Table:
    latest = [name for name in _LATEST if metrics.clients.get(name)]
    summed = [name for name in ("bytes_up",) if metrics.clients.get(name)]
    phases = [name for name in _PHASES if metrics.clients.get(name)]
    shown, caption = ids, "Every client: latest metrics and totals"
    if len(ids) > _MOST_CLIENTS and measures:
        name = measures[0]
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
        cells = [_cell(_last(metrics.clients[name].get(client, {})), name) for name in latest]
        cells += [_cell(_total(metrics.clients[name].get(client)), name) for name in summed]
        if phases:
            totals = [_total(metrics.clients[name].get(client)) for name in phases]
            spent = [total for total in totals if total is not None]
            cells.append(_cell(sum(spent) if spent else None, phases[0]))
        rows.append((client, cells))
    heads = ["client", *(metric(name).label for name in (*latest, *summed)), *(["time"] if phases else [])]
    return Table(caption, heads, rows)


def _partition(run: RecordedRun) -> list[Block]:
    partition = run.partition
    if partition is None:
        return []
    sizes = [sum(rows) for rows in partition.clients.values()]
    shown = charts.shown_clients(partition.clients)
    total = f"{sum(sizes):,} rows of {len(partition.classes):,} classes at {len(sizes):,} clients"
    caption = "Shade: the label’s share of the client’s rows."
    if len(shown) < len(sizes):
        caption += f" {len(shown)} of {len(sizes):,} clients, evenly spaced from the largest to the smallest."
    caption += _together(len(partition.classes))
    smallest, largest = min(sizes), max(sizes)
    drawn = [
        chart(
            charts.partition_heat_map(partition.classes, partition.clients),
            "partition",
            "Labels by client",
            f"Heat map of labels by client: {total}.",
            caption,
        ),
        chart(
            charts.sizes_chart(sizes),
            "sizes",
            "Rows by client",
            f"Rows of each client, largest first: from {largest:,} down to {smallest:,}.",
            f"From {smallest:,} to {largest:,} rows a client.",
        ),
    ]
    left_out = f" {partition.left_out:,} rows were left out." if partition.left_out else ""
    return [Note(f"{total}.{left_out}"), Grid(drawn)]


def _bytes(run: RecordedRun) -> list[Block]:
    found = {
        label: run.metrics.server[name]
        for name, label in (
            ("bytes_up", "up, to the server"),
            ("bytes_down", "down, to the clients"),
            ("bytes_down_validation", "down, for validation"),
        )
        if run.metrics.server.get(name)
    }
    if not found:
        return []
    drawn = []
    for key, title, by_label in (
        ("bytes", "Bytes by round", found),
        ("bytes-total", "Bytes so far", {label: _running(series) for label, series in found.items()}),
    ):
        lines = [
            charts.Line(label, series, colour)
            for (label, series), colour in zip(by_label.items(), ("accent", "second", "third"), strict=False)
        ]
        form = formats.form_of("bytes_up")
        told = "; ".join(curve_in_words(line.label, line.points, form) for line in lines)
        figure = charts.line_chart(lines, form=form, from_zero=True)
        drawn.append(chart(figure, key, title, f"{title}. {told}."))
    return [Grid(drawn)]


def _seconds(run: RecordedRun) -> list[Block]:
    parts: dict[str, Series] = {}
    for name in _PHASES:
        if found := run.metrics.server.get(name) or run.metrics.summed(name):
            parts[name.removeprefix("seconds_")] = found
    if not parts:
        return []
    form = formats.seconds
    told = "; ".join(f"{label} {form(_total(series) or 0)} in all" for label, series in parts.items())
    clients = [label for label in parts if label != "evaluation"]
    caption = f"Seconds of {_and(clients)} are summed over the clients." if clients else ""
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
            told_of = (sum(finite), sum(finite) / len(finite), max(finite))
            rows.append((label, [_measured(value, form) for value in told_of]))
    return [Grid([drawn, Table("Time by phase", ["phase", "total", "mean", "longest"], rows)])]


def _confusion(run: RecordedRun) -> list[Block]:
    confusion = run.confusion
    if confusion is None:
        return []
    classes, matrix = confusion.classes, confusion.matrix
    total = sum(map(sum, matrix))
    right = sum(row[index] for index, row in enumerate(matrix))
    told = f"{right:,} of {total:,} test rows on the diagonal, predicted as what they are."
    drawn = chart(
        charts.confusion_matrix(classes, matrix),
        "confusion",
        "True and predicted classes",
        f"Confusion matrix of {len(classes):,} classes: {told}",
        "Shade: the share of the true class’s rows." + _together(len(classes)),
    )
    mistakes = sorted(
        (-count, true, predicted)
        for true, row in enumerate(matrix)
        for predicted, count in enumerate(row)
        if count > 0 and true != predicted
    )[:_MOST_MISTAKES]
    blocks: list[Chart | Table] = [drawn]
    if mistakes:
        rows = [(classes[t], [classes[p], f"{-count:,}"]) for count, t, p in mistakes]
        columns = ["true", "predicted", "rows"]
        blocks.append(Table("Most frequent mistakes", columns, rows, numeric=False))
    return [Note(told), Grid(blocks)]


def _together(classes: int) -> str:
    return " Neighbouring classes are drawn together." if classes > charts.MOST_CLASSES else ""


def _diagnostics(run: RecordedRun) -> list[Block]:
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


def _settings(run: RecordedRun) -> list[Block]:
    # The description is at the top of the page.
    general = {
        key: value
        for key, value in run.config.items()
        if not isinstance(value, Mapping) and key != "description"
    }
    sections = {key: value for key, value in run.config.items() if isinstance(value, Mapping) and value}
    return _columns(({"run": general} if general else {}) | sections)


def _environment(run: RecordedRun) -> list[Block]:
    if not run.environment:
        return []
    general = {key: value for key, value in run.environment.items() if not isinstance(value, Mapping)}
    sections = {key: value for key, value in run.environment.items() if isinstance(value, Mapping) and value}
    return _columns(({"machine": general} if general else {}) | sections)


def _log(run: RecordedRun) -> list[Block]:
    title = "The end of run.log"
    return [] if run.log is None else [Folded(title, Log(title, run.log))]


def _footer(run: RecordedRun) -> str:
    lost = run.metrics.unreadable
    note = ""
    if lost:
        note = f"{lost:,} line{'s' if lost != 1 else ''} of metrics.jsonl could not be read and " + (
            "are left out. " if lost != 1 else "is left out. "
        )
    return f"{note}Every number is from the run’s own files; a dash was not measured."


def _columns(sections: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    if not sections:
        return []
    return [Columns([Pairs(key, formats.flat_texts(values)) for key, values in sections.items()])]


def _setting(run: RecordedRun, section: str, key: str) -> Any:
    table = run.config.get(section)
    return table.get(key) if isinstance(table, Mapping) else None


def _measured(value: float, form: Callable[[float], str] = formats.number, note: str = "") -> Number:
    return Number(value, form(value), note)


def _cell(value: float | None, name: str, note: str = "") -> Number | None:
    return None if value is None else _measured(value, formats.form_of(name), note)


def _last(series: Series) -> float | None:
    return series[max(series)] if series else None


def _total(series: Series | None) -> float | None:
    """The sum of what is finite; None where nothing was measured."""
    finite = [value for value in (series or {}).values() if math.isfinite(value)]
    return sum(finite) if finite else None


def _running(series: Series) -> dict[int, float]:
    rounds = sorted(series)
    values = (series[round] if math.isfinite(series[round]) else 0.0 for round in rounds)
    return dict(zip(rounds, accumulate(values), strict=True))


def _ordered(series: Series) -> dict[int, float]:
    return dict(sorted(series.items()))


def _and(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""
