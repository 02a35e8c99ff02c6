"""The confusion matrix of the newest round."""

from __future__ import annotations

from fedsmoothlora.reports import charts
from fedsmoothlora.reports.blocks import Block, Chart, Grid, Note, Table, chart
from fedsmoothlora.reports.reading import RecordedRun

_MOST_MISTAKES = 10


def confusion(run: RecordedRun) -> list[Block]:
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
        "Shade: the share of the true class’s rows." + charts.grouping_note(len(classes)),
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
