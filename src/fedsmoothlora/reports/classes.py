"""Metrics by class, from a confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedsmoothlora.reports.reading import Confusion


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """The metrics of one class, by the definitions of scikit-learn's ``precision_recall_fscore_support``.

    A quotient with the denominator 0 is 0, as with scikit-learn's ``zero_division=0``: precision of a class
    that is never predicted, recall of a class without rows, F1 of a class with neither.

    Attributes:
        name: the class.
        precision: share of the rows predicted as this class that belong to it.
        recall: share of this class's rows that are predicted as it.
        f1: harmonic mean of the two, ``2 TP / (2 TP + FP + FN)``.
        support: rows of this class.
    """

    name: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, kw_only=True)
class Majority:
    """The most frequent class of the evaluated rows.

    Attributes:
        name: the class; the first of several.
        rows: its rows.
        share: their share of all rows, which is the accuracy of a model that always predicts the class.
    """

    name: str
    rows: int
    share: float


def class_metrics(confusion: Confusion) -> list[ClassMetrics]:
    """The metrics of every class, in the order of the matrix."""
    counts = np.asarray(confusion.matrix, dtype=np.int64)  # (true, predicted)
    right, support, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    columns = zip(
        confusion.classes,
        (right / np.maximum(predicted, 1)).tolist(),
        (right / np.maximum(support, 1)).tolist(),
        (2 * right / np.maximum(support + predicted, 1)).tolist(),
        support.tolist(),
        strict=True,
    )
    return [
        ClassMetrics(name=name, precision=precision, recall=recall, f1=f1, support=rows)
        for name, precision, recall, f1, rows in columns
    ]


def majority(confusion: Confusion) -> Majority | None:
    """The most frequent class; None for a matrix without rows."""
    supports = [sum(row) for row in confusion.matrix]
    rows, total = max(supports), sum(supports)
    if total == 0:
        return None
    return Majority(name=confusion.classes[supports.index(rows)], rows=rows, share=rows / total)
