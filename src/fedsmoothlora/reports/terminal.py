"""A run's result in a terminal: its final metrics, and those of its classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from fedsmoothlora.reports import formats
from fedsmoothlora.reports.classes import ClassMetrics, class_metrics, majority
from fedsmoothlora.reports.metrics import HIGHLIGHTS, METRICS, OVER_CLIENTS, PREFIXES, QUALITY, metric
from fedsmoothlora.reports.reading import RecordedRun, read_run

_MOST_CLASSES = 20
_LOWEST = 10
_LONGEST_NAME = 30


def result(folder: Path) -> list[Text | Table]:
    """The final metrics of the run in ``folder``, beside accuracy the majority share, and those by class.

    A line names each round in which the run had lost more than half of what it had gained.

    Raises ``ReportError`` if ``folder`` is not the folder of a run, or if a file in it cannot be read.
    """
    run = read_run(folder)
    lines = [", ".join(_final(run)), *map(str, run.setbacks), *_over_clients(run)]
    return [*(Text(line) for line in lines if line), *_classes(run)]


def _final(run: RecordedRun) -> Iterator[str]:
    for name in QUALITY:
        if series := run.metrics.server.get(name):
            text = f"{METRICS[name].label} {formats.decimals(series[max(series)])}"
            most = majority(run.confusion) if name == "accuracy" and run.confusion else None
            yield text if most is None else f"{text} (majority share {formats.decimals(most.share)})"


def _over_clients(run: RecordedRun) -> Iterator[str]:
    """A line on the main metric over clients for the global, the clients' own and the personal models."""
    server = run.metrics.server
    for prefix in ("", *PREFIXES):
        for name in HIGHLIGHTS:
            variant = f"{prefix}{name}"
            last = {end: server.get(f"{variant}{end}") for end in OVER_CLIENTS}
            values = [formats.decimals(series[max(series)]) for series in last.values() if series]
            if len(values) == len(OVER_CLIENTS):
                mean, worst, std = values
                label = metric(variant).label if prefix else f"{metric(variant).label} of the global model"
                yield (
                    f"over clients, {label}: mean {mean}, worst 10 % {worst} (mean of the worst ⌈C/10⌉), "
                    f"standard deviation {std}"
                )


def _classes(run: RecordedRun) -> Iterator[Table]:
    if run.confusion is None:
        return
    every = class_metrics(run.confusion)
    if len(every) <= _MOST_CLASSES:
        yield _class_table("metrics by class", every)
    else:
        lowest = sorted(every, key=lambda one: one.f1)[:_LOWEST]
        yield _class_table(f"the {_LOWEST} of {len(every):,} classes with the lowest F1", lowest)


def _class_table(title: str, classes: Sequence[ClassMetrics]) -> Table:
    table = Table("class", box=None, title=title, title_justify="left")
    for column in ("precision", "recall", "F1", "support"):
        table.add_column(column, justify="right")
    names = formats.distinct([one.name for one in classes], _LONGEST_NAME)
    for name, one in zip(names, classes, strict=True):
        values = (formats.decimals(value) for value in (one.precision, one.recall, one.f1))
        table.add_row(Text(name), *values, f"{one.support:,}")
    return table
