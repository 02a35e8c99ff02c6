"""The most important charts as PNG files in the run's folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from fedsmoothlora.reports import charts
from fedsmoothlora.reports.metrics import HIGHLIGHTS, METRICS
from fedsmoothlora.reports.reading import RecordedRun
from fedsmoothlora.storage.files import write_whole

_DOTS_PER_INCH = 150


def save_pictures(run: RecordedRun, folder: Path) -> list[Path]:
    """Write ``accuracy.png``, ``exact_match.png``, ``loss.png`` and others, for the metrics that the run has.

    Returns the paths.
    """
    written = []
    for name, figure in _figures(run):
        path = folder / f"{name}.png"
        with write_whole(path) as temporary, warnings.catch_warnings():
            # Names in a script that matplotlib's font lacks are drawn as boxes here, as letters on the page.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(temporary, dpi=_DOTS_PER_INCH, format="png")
        written.append(path)
    return written


def _figures(run: RecordedRun) -> Iterator[tuple[str, Figure]]:
    server, model = run.metrics.server, run.metrics.measured_model
    for name in HIGHLIGHTS:
        if server.get(name):
            line = charts.Line(model, server[name])
            yield name, charts.line_chart([line], ylabel=METRICS[name].label)
    if server.get("loss"):
        lines = [charts.Line(model, server["loss"])]
        if server.get("train_loss"):
            lines.append(charts.Line("training, mean over clients", server["train_loss"], "second"))
        yield "loss", charts.line_chart(lines, ylabel="loss")
    if run.partition is not None:
        yield "partition", charts.partition_heat_map(run.partition.classes, run.partition.clients)
    if run.confusion is not None:
        yield "confusion", charts.confusion_matrix(run.confusion.classes, run.confusion.matrix)
