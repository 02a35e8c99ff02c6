"""Learning curves of the global model, and the numbers of every round."""

from __future__ import annotations

import math
from typing import Any

from fedsmoothlora.reports import charts
from fedsmoothlora.reports.blocks import Block, Chart, Folded, Grid, Table, chart
from fedsmoothlora.reports.cells import cell
from fedsmoothlora.reports.formats import curve_in_words
from fedsmoothlora.reports.metrics import METRICS, QUALITY, metric
from fedsmoothlora.reports.reading import Metrics, RecordedRun, client_order

_MOST_LINES, _MOST_POINTS = 20, 2_000
_MOST_ROUNDS = 500


def curves(run: RecordedRun) -> list[Block]:
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
                        client: dict(sorted(losses[client].items()))
                        for client in sorted(losses, key=client_order)
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
    rows = [(str(round), [cell(metrics.server[name].get(round), name) for name in names]) for round in shown]
    columns = ["round", *(metric(name).label for name in names)]
    return Folded("Numbers of every round", Table(caption, columns, rows))
