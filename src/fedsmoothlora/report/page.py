"""A report's page: its sections, each made of what was measured, or left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any

from fedsmoothlora.report import charts, pieces, tables
from fedsmoothlora.report.reading import Metrics, RecordedRun, Series, client_order, larger_is_better

_PHASES = {
    "seconds_start": "start",
    "seconds_training": "training",
    "seconds_upload": "upload",
    "seconds_diagnosis": "diagnosis",
    "seconds_evaluation": "evaluation",
    "seconds_checkpoint": "checkpoint",
}
# Drawn or told in a section of their own; every other name is a diagnostic.
_SERVER = {
    *("accuracy", "exact_match", "loss", "perplexity", "macro_f1", "auroc"),
    *("train_loss", "clients", "refused"),
    *("bytes_up", "bytes_down", "seconds_round", *_PHASES),
}
_CLIENT = {
    *("train_loss", "train_loss_first", "train_loss_last", "samples", "bytes_up", "bytes_down"),
    *("accuracy", "loss", "perplexity", "own_accuracy", "own_loss", "own_perplexity", *_PHASES),
}
_LATEST = ("samples", "accuracy", "own_accuracy", "loss", "own_loss", "train_loss")
_MEASURES = ("accuracy", "own_accuracy", "loss", "own_loss", "train_loss")
_MOST_LINES, _MOST_POINTS = 20, 2_000
_MOST_CLIENTS = 60
_ENDS = 10
_MOST_ROUNDS = 500
_MOST_DIAGNOSTICS = 24
_MOST_MISTAKES = 10


def page(run: RecordedRun) -> str:
    """The whole page as HTML."""
    sections = {
        key: (title, body)
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
        if (body := write(run))
    }
    return pieces.document(
        title=f"{_name(run)}: report of a run",
        headline=_headline(run),
        sections=sections,
        footer=_footer(run),
    )


def _name(run: RecordedRun) -> str:
    return str(run.config.get("name") or run.folder.name)


def _headline(run: RecordedRun) -> str:
    server = run.metrics.server
    facts = {
        "Method": _setting(run, "method", "name"),
        "Model": _setting(run, "model", "source"),
        "Data": _setting(run, "data", "source"),
    }
    parts = [f"<h1>{tables.escape(_name(run))}</h1>"]
    if run.config.get("description"):
        parts.append(f"<p>{tables.escape(run.config['description'])}</p>")
    shown = "\n".join(
        f"<div><dt>{key}</dt><dd>{tables.escape(value)}</dd></div>"
        for key, value in facts.items()
        if value is not None
    )
    parts.append(f'<dl class="facts">\n{shown}\n</dl>' if shown else "")
    big = [
        pieces.big(f"Final {pieces.word(name)}", *_final(server[name], tables.form_of(name)))
        for name in ("accuracy", "exact_match", "loss", "perplexity")
        if server.get(name)
    ]
    rounds, planned = run.metrics.rounds, _setting(run, "training", "rounds")
    if rounds is not None:
        big.append(
            pieces.big("Rounds finished", tables.measured(rounds), f"of {planned} planned" if planned else "")
        )
    for name, title in (("bytes_up", "Sent up"), ("bytes_down", "Sent down")):
        if total := _total(server.get(name)):
            big.append(
                pieces.big(title, tables.measured(total, tables.form_of(name)), "by all clients together")
            )
    times = ("seconds_round", "seconds_evaluation", "seconds_checkpoint")
    timed = [name for name in times if _total(server.get(name)) is not None]
    if timed:
        total_time = sum(_total(server[name]) or 0 for name in timed)
        big.append(
            pieces.big(
                "Total time",
                tables.measured(total_time, tables.seconds),
                _and([name.removeprefix("seconds_").replace("round", "rounds") for name in timed]),
            )
        )
    parts.append('<dl class="big">\n' + "\n".join(big) + "\n</dl>" if big else "")
    return "\n".join(part for part in parts if part)


def _final(series: Series, form: Callable[[float], str]) -> tuple[str, str]:
    """The last value, and its change since round 0."""
    last = max(series)
    change = series[last] - series[0] if 0 in series and last > 0 else math.nan
    if not math.isfinite(change):
        return tables.measured(series[last], form), f"after round {last}"
    sign = "+" if change > 0 else "−" if change < 0 else "±"
    return tables.measured(series[last], form), f"{sign}{form(abs(change))} since round 0"


def _curves(run: RecordedRun) -> str:
    server, metrics = run.metrics.server, run.metrics
    figures = []
    for name in ("accuracy", "exact_match", "loss", "perplexity", "macro_f1", "auroc"):
        if not server.get(name) and not (name == "loss" and _has_training_loss(metrics)):
            continue
        title = pieces.title(name)
        lines = [charts.Line("global model", server[name])] if server.get(name) else []
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
            "; ".join(pieces.told(line.label, line.points) for line in lines) or "clients’ training loss"
        )
        figures.append(pieces.chart(figure, name, title, f"{title} by round. {described}.", caption))
    if not figures:
        return ""
    return pieces.grid(figures) + _every_round(metrics)


def _has_training_loss(metrics: Metrics) -> bool:
    return bool(metrics.server.get("train_loss") or metrics.clients.get("train_loss"))


def _every_round(metrics: Metrics) -> str:
    """Exact numbers of every round, folded away."""
    names = [
        name
        for name in (
            "accuracy",
            "exact_match",
            "loss",
            "perplexity",
            "macro_f1",
            "auroc",
            "train_loss",
            "bytes_up",
            "bytes_down",
            "seconds_round",
        )
        if metrics.server.get(name)
    ]
    rounds = sorted({round for name in names for round in metrics.server[name]})
    step = math.ceil(len(rounds) / _MOST_ROUNDS)
    # The last round is always among them.
    shown = rounds[::-step][::-1]
    caption = "Every round" if step == 1 else f"Every {step}th round"
    rows = [(str(round), [_cell(metrics.server[name].get(round), name) for name in names]) for round in shown]
    return (
        "\n<details><summary>Numbers of every round</summary>\n"
        + tables.table(caption, ["round", *(pieces.word(name) for name in names)], rows)
        + "\n</details>"
    )


def _clients(run: RecordedRun) -> str:
    metrics = run.metrics
    ids = metrics.client_ids()
    if not ids:
        return ""
    figures = []
    measures = [name for name in _MEASURES if metrics.clients.get(name)]
    drawn = [name for name in measures if "accuracy" in name] or measures[:1]
    for name in drawn:
        spread, better = metrics.spread(name), larger_is_better(name)
        best, worst = (spread.high, spread.low) if better else (spread.low, spread.high)
        told = "; ".join(
            pieces.told(label, series)
            for label, series in (("worst", worst), ("median", spread.middle), ("best", best))
        )
        title = f"{pieces.title(name)} over clients"
        caption = {
            "accuracy": "The global model on each client’s validation rows.",
            "own_accuracy": "Each client’s own model on its validation rows.",
        }.get(name, f"{pieces.title(name)} of each client.")
        figure = charts.spread_chart(spread, larger_is_better=better)
        figures.append(pieces.chart(figure, f"clients-{name}", title, f"{title} by round. {told}.", caption))
    return "\n".join(
        part
        for part in (
            f'<p class="quiet">{tables.escape(_taking_part(metrics, len(ids)))}</p>',
            pieces.grid(figures) if figures else "",
            _spread_table(metrics, measures),
            _client_table(metrics, ids, measures),
        )
        if part
    )


def _taking_part(metrics: Metrics, clients: int) -> str:
    counts = [n for n in metrics.server.get("clients", {}).values() if math.isfinite(n)]
    sentence = f"{clients:,} client{'s' if clients != 1 else ''}"
    if counts and min(counts) == max(counts):
        sentence += f", {tables.number(counts[0])} in every round."
    elif counts:
        sentence += f", from {tables.number(min(counts))} to {tables.number(max(counts))} in a round."
    else:
        sentence += "."
    refused = _total(metrics.server.get("refused"))
    if refused is not None:
        sentence += f" Uploads refused: {tables.number(refused)}."
    return sentence


def _spread_table(metrics: Metrics, measures: list[str]) -> str:
    """Worst, median and best client, each measure in the last round that has it."""
    rows = []
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
                pieces.word(name),
                [
                    str(last),
                    f"{_cell(values[worst], name)} (client {tables.escape(worst)})",
                    _cell(middle, name),
                    f"{_cell(values[best], name)} (client {tables.escape(best)})",
                ],
            )
        )
    if not rows:
        return ""
    return tables.table("Spread over clients", ["measure", "round", "worst", "median", "best"], rows)


def _client_table(metrics: Metrics, ids: list[str], measures: list[str]) -> str:
    latest = [name for name in _LATEST if metrics.clients.get(name)]
    summed = [name for name in ("bytes_up", "bytes_down") if metrics.clients.get(name)]
    phases = [name for name in _PHASES if metrics.clients.get(name)]
    shown, caption = ids, "Every client: latest figures and totals"
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
            f"The {_ENDS} worst and the {_ENDS} best of {len(ids):,} clients by latest {pieces.word(name)}"
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
    heads = ["client", *(pieces.word(name) for name in (*latest, *summed)), *(["time"] if phases else [])]
    return tables.table(caption, heads, rows)


def _partition(run: RecordedRun) -> str:
    partition = run.partition
    if partition is None:
        return ""
    sizes = [sum(rows) for rows in partition.clients.values()]
    shown = charts.shown_clients(partition.clients)
    total = f"{sum(sizes):,} rows of {len(partition.classes):,} classes at {len(sizes):,} clients"
    caption = "Shade: the label’s share of the client’s rows."
    if len(shown) < len(sizes):
        caption += f" {len(shown)} of {len(sizes):,} clients, evenly spaced from the largest to the smallest."
    caption += _together(len(partition.classes))
    smallest, largest = min(sizes), max(sizes)
    figures = [
        pieces.chart(
            charts.partition_heat_map(partition.classes, partition.clients),
            "partition",
            "Labels by client",
            f"Heat map of labels by client: {total}.",
            caption,
        ),
        pieces.chart(
            charts.sizes_chart(sizes),
            "sizes",
            "Rows by client",
            f"Rows of each client, largest first: from {largest:,} down to {smallest:,}.",
            f"From {smallest:,} to {largest:,} rows a client.",
        ),
    ]
    left_out = f" {partition.left_out:,} rows were left out." if partition.left_out else ""
    return f'<p class="quiet">{total}.{left_out}</p>\n' + pieces.grid(figures)


def _bytes(run: RecordedRun) -> str:
    found = {
        label: run.metrics.server[name]
        for name, label in (("bytes_up", "up, to the server"), ("bytes_down", "down, to the clients"))
        if run.metrics.server.get(name)
    }
    if not found:
        return ""
    figures = []
    for key, title, by_label in (
        ("bytes", "Bytes by round", found),
        ("bytes-total", "Bytes so far", {label: _running(series) for label, series in found.items()}),
    ):
        lines = [
            charts.Line(label, series, colour)
            for (label, series), colour in zip(by_label.items(), ("accent", "second"), strict=False)
        ]
        form = tables.form_of("bytes_up")
        told = "; ".join(pieces.told(line.label, line.points, form) for line in lines)
        figure = charts.line_chart(lines, form=form, from_zero=True)
        figures.append(pieces.chart(figure, key, title, f"{title}. {told}."))
    return pieces.grid(figures)


def _seconds(run: RecordedRun) -> str:
    parts: dict[str, Series] = {}
    for name, label in _PHASES.items():
        if found := run.metrics.server.get(name) or run.metrics.summed(name):
            parts[label] = found
    if not parts:
        return ""
    form = tables.seconds
    told = "; ".join(f"{label} {form(_total(series) or 0)} in all" for label, series in parts.items())
    clients = [label for label in parts if label not in ("evaluation", "checkpoint")]
    caption = f"Seconds of {_and(clients)} are summed over the clients." if clients else ""
    chart = pieces.chart(
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
            rows.append((label, [tables.measured(value, form) for value in told_of]))
    return pieces.grid(
        [chart, f"<div>{tables.table('Time by phase', ['phase', 'total', 'mean', 'longest'], rows)}</div>"]
    )


def _confusion(run: RecordedRun) -> str:
    confusion = run.confusion
    if confusion is None:
        return ""
    classes, matrix = confusion.classes, confusion.matrix
    total = sum(map(sum, matrix))
    right = sum(row[index] for index, row in enumerate(matrix))
    told = f"{right:,} of {total:,} test rows on the diagonal, predicted as what they are."
    chart = pieces.chart(
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
    blocks = [chart]
    if mistakes:
        rows = [(classes[t], [tables.escape(classes[p]), f"{-count:,}"]) for count, t, p in mistakes]
        found = tables.table("Most frequent mistakes", ["true", "predicted", "rows"], rows, numbers=False)
        blocks.append(f"<div>{found}</div>")
    return f'<p class="quiet">{told}</p>\n' + pieces.grid(blocks)


def _together(classes: int) -> str:
    return " Neighbouring classes are drawn together." if classes > charts.MOST_CLASSES else ""


def _diagnostics(run: RecordedRun) -> str:
    metrics = run.metrics
    server = sorted(name for name, series in metrics.server.items() if series and name not in _SERVER)
    clients = sorted(name for name, by_client in metrics.clients.items() if by_client and name not in _CLIENT)
    figures = []
    for number, name in enumerate(server[:_MOST_DIAGNOSTICS]):
        figure = charts.line_chart([charts.Line(name, metrics.server[name])], width=charts.NARROW)
        figures.append(
            pieces.chart(
                figure,
                f"diagnostic-{number}",
                pieces.title(name),
                f"{pieces.told(name, metrics.server[name], tables.number)}.",
            )
        )
    for number, name in enumerate(clients[: _MOST_DIAGNOSTICS - len(figures)]):
        spread = metrics.spread(name)
        figure = charts.line_chart([], band=spread, band_label="clients", width=charts.NARROW)
        title = f"{pieces.title(name)} over clients"
        figures.append(
            pieces.chart(
                figure,
                f"client-diagnostic-{number}",
                title,
                f"{pieces.told(f'{name}, median', spread.middle, tables.number)}.",
            )
        )
    if not figures:
        return ""
    hidden = len(server) + len(clients) - len(figures)
    note = f'\n<p class="quiet">{hidden} more are in metrics.jsonl.</p>' if hidden else ""
    return f'<div class="charts small">\n{chr(10).join(figures)}\n</div>{note}'


def _settings(run: RecordedRun) -> str:
    # The description is at the top of the page.
    general = {
        key: value
        for key, value in run.config.items()
        if not isinstance(value, Mapping) and key != "description"
    }
    sections = {key: value for key, value in run.config.items() if isinstance(value, Mapping) and value}
    found = ({"run": general} if general else {}) | sections
    return _pairs(found)


def _environment(run: RecordedRun) -> str:
    if not run.environment:
        return ""
    general = {key: value for key, value in run.environment.items() if not isinstance(value, Mapping)}
    sections = {key: value for key, value in run.environment.items() if isinstance(value, Mapping) and value}
    return _pairs(({"machine": general} if general else {}) | sections)


def _log(run: RecordedRun) -> str:
    if run.log is None:
        return ""
    return (
        "<details><summary>The end of run.log</summary>\n"
        '<div class="scroll" tabindex="0" role="region" aria-label="The end of run.log">'
        f"<pre>{tables.escape(run.log)}</pre></div>\n</details>"
    )


def _footer(run: RecordedRun) -> str:
    lost = run.metrics.unreadable
    note = ""
    if lost:
        note = f"{lost:,} line{'s' if lost != 1 else ''} of metrics.jsonl could not be read and " + (
            "are left out. " if lost != 1 else "is left out. "
        )
    return f"<footer><p>{note}Every number is from the run’s own files; a dash was not measured.</p></footer>"


def _pairs(sections: Mapping[str, Mapping[str, Any]]) -> str:
    if not sections:
        return ""
    blocks = "\n".join(f"<div>{tables.pairs(key, values)}</div>" for key, values in sections.items())
    return f'<div class="pairs">\n{blocks}\n</div>'


def _setting(run: RecordedRun, section: str, key: str) -> Any:
    table = run.config.get(section)
    return table.get(key) if isinstance(table, Mapping) else None


def _cell(value: float | None, name: str) -> str | None:
    return None if value is None else tables.measured(value, tables.form_of(name))


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
