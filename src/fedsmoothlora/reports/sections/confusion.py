"""The classes: confusion matrix, most frequent mistakes, precision, recall and F1."""

from __future__ import annotations

from collections.abc import Sequence

from fedsmoothlora.reports import charts, formats
from fedsmoothlora.reports.blocks import Block, Chart, Folded, Grid, Note, Table, chart
from fedsmoothlora.reports.cells import measured
from fedsmoothlora.reports.classes import ClassMetrics, class_metrics, majority
from fedsmoothlora.reports.reading import Confusion, RecordedRun

_MOST_MISTAKES = 10
_MOST_CLASSES = 30
_LOWEST = 10


def confusion(run: RecordedRun) -> list[Block]:
    """Which classes are told apart, and how well each is."""
    found = run.confusion
    if found is None:
        return []
    right = sum(row[index] for index, row in enumerate(found.matrix))
    told = (
        f"{right:,} of {sum(map(sum, found.matrix)):,} rows are predicted as the class that they belong to."
    )
    most = majority(found)
    if most is not None:
        told += (
            f" The most frequent class, {most.name}, has {most.rows:,} of them: always predicting it has an "
            f"accuracy of {formats.decimals(most.share)}."
        )
    mistakes = _mistakes(found)
    beside = [mistakes] if mistakes else []
    return [
        Note(" ".join(filter(None, (told, run.evaluated_rows)))),
        Grid([_matrix(found, told), *beside]),
        *_class_tables(class_metrics(found)),
    ]


def _matrix(found: Confusion, told: str) -> Chart:
    return chart(
        charts.confusion_matrix(found.classes, found.matrix),
        "confusion",
        "True and predicted classes",
        f"Confusion matrix of {len(found.classes):,} classes: {told}",
        "Shade: the share of the true class’s rows." + charts.grouping_note(len(found.classes)),
    )


def _mistakes(found: Confusion) -> Table | None:
    mistakes = sorted(
        (-count, true, predicted)
        for true, row in enumerate(found.matrix)
        for predicted, count in enumerate(row)
        if count > 0 and true != predicted
    )[:_MOST_MISTAKES]
    if not mistakes:
        return None
    rows = [(found.classes[t], [found.classes[p], f"{-count:,}"]) for count, t, p in mistakes]
    return Table("Most frequent mistakes", ["true", "predicted", "rows"], rows, numeric=False)


def _class_tables(every: Sequence[ClassMetrics]) -> list[Block]:
    """Every class; of many classes, those with the lowest F1, and every class folded away."""
    note = Note(
        "Precision: the share of the rows predicted as the class that belong to it. Recall: the share of the "
        "class’s rows that are predicted as it. F1: their harmonic mean. Support: the class’s rows. A metric "
        "whose denominator is 0 is 0, as in scikit-learn with zero_division=0."
    )
    if len(every) <= _MOST_CLASSES:
        return [_class_table("Metrics by class", every), note]
    lowest = sorted(every, key=lambda one: one.f1)[:_LOWEST]
    caption = f"The {_LOWEST} of {len(every):,} classes with the lowest F1"
    whole = Folded("Metrics of every class", _class_table("Metrics by class", every))
    return [_class_table(caption, lowest), note, whole]


def _class_table(caption: str, classes: Sequence[ClassMetrics]) -> Table:
    rows = [
        (
            one.name,
            [
                *(measured(value, formats.decimals) for value in (one.precision, one.recall, one.f1)),
                measured(one.support),
            ],
        )
        for one in classes
    ]
    return Table(caption, ["class", "precision", "recall", "F1", "support"], rows)
