"""Learning curves of the global model, and the metrics of every round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedsmoothlora.reports import charts
from fedsmoothlora.reports.blocks import Block, Chart, Folded, Grid, Note, Table, chart
from fedsmoothlora.reports.cells import cell
from fedsmoothlora.reports.classes import majority
from fedsmoothlora.reports.formats import curve_in_words
from fedsmoothlora.reports.metrics import METRICS, QUALITY, metric
from fedsmoothlora.reports.reading import Metrics, RecordedRun, client_order

_MOST_LINES, _MOST_POINTS = 20, 2_000
_MOST_ROUNDS = 500
_FEW_ROUNDS = 10


def curves(run: RecordedRun) -> list[Block]:
    """A chart of each metric of quality, and all their values in a table."""
    drawn = quality_charts(run)
    if not drawn:
        return []
    # A chart alone would leave half of the row empty.
    beside = [_table(run.metrics, _FEW_ROUNDS)] if len(drawn) == 1 and run.metrics.server else []
    notes = [Note(f"{str(one)[:1].upper()}{str(one)[1:]}.") for one in run.setbacks]
    table = Folded("Metrics of every round", _table(run.metrics, _MOST_ROUNDS))
    return [*notes, Grid([*drawn, *beside]), table]


def quality_charts(run: RecordedRun, names: Sequence[str] = QUALITY, prefix: str = "") -> list[Chart]:
    """A chart of each of the metrics that was recorded. Every id in the charts begins with ``prefix``."""
    return [
        _curve(run, name, prefix)
        for name in names
        if run.metrics.server.get(name) or (name == "loss" and _has_training_loss(run.metrics))
    ]


def _curve(run: RecordedRun, name: str, prefix: str) -> Chart:
    """The metric of the global model; beside a loss the training loss, beside accuracy the majority share."""
    metrics, title = run.metrics, METRICS[name].title
    series = metrics.server.get(name)
    lines = [charts.Line(metrics.measured_model, series)] if series else []
    caption = [f"{run.evaluated_rows} Round 0 is before any training."] if series else []
    options: dict[str, Any] = {}
    if name == "loss" and _has_training_loss(metrics):
        options = _training_losses(metrics)
        if metrics.server.get("train_loss"):
            lines.append(charts.Line("training, mean", metrics.server["train_loss"], "second"))
        caption.append("The training loss is that of the clients’ own rows.")
    most = majority(run.confusion) if name == "accuracy" and run.confusion else None
    if most is not None:
        options["level"] = ("majority share", most.share)
        caption.append("Dashed: the accuracy of always predicting the most frequent class.")
    described = (
        "; ".join(curve_in_words(line.label, line.points) for line in lines) or "clients’ training loss"
    )
    figure = charts.line_chart(lines, **options)
    return chart(figure, prefix + name, title, f"{title} by round. {described}.", " ".join(caption).strip())


def _training_losses(metrics: Metrics) -> dict[str, Any]:
    """The clients' training losses behind a chart: a line each, or a band where there are many."""
    losses = metrics.clients.get("train_loss", {})
    if not losses:
        return {}
    if len(losses) > _MOST_LINES or sum(map(len, losses.values())) > _MOST_POINTS:
        return {"band": metrics.spread("train_loss"), "band_label": "training"}
    behind = {client: dict(sorted(losses[client].items())) for client in sorted(losses, key=client_order)}
    return {"behind": behind, "behind_label": "training, clients"}


def _has_training_loss(metrics: Metrics) -> bool:
    return bool(metrics.server.get("train_loss") or metrics.clients.get("train_loss"))


def _table(metrics: Metrics, most: int) -> Table:
    """The values of the metrics, in so many rounds at most."""
    wanted = (*QUALITY, "train_loss", "epsilon", "bytes_up", "bytes_down", "seconds_round")
    names = [name for name in wanted if metrics.server.get(name)]
    rounds = sorted({round for name in names for round in metrics.server[name]})
    step = max(1, math.ceil(len(rounds) / most))
    # The last round is always among them.
    shown = rounds[::-step][::-1]
    caption = "Every round" if step == 1 else f"One round in {step}"
    rows = [(str(round), [cell(metrics.server[name].get(round), name) for name in names]) for round in shown]
    columns = ["round", *(metric(name).label for name in names)]
    return Table(caption, columns, rows)
