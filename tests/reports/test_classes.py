"""Metrics by class are those of scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from fedsmoothlora.reports.classes import class_metrics, majority
from fedsmoothlora.reports.reading import Confusion

ROWS = st.integers(1, 4).flatmap(
    lambda classes: st.tuples(
        st.just(classes),
        st.lists(
            st.tuples(st.integers(0, classes - 1), st.integers(0, classes - 1)), min_size=1, max_size=30
        ),
    )
)


def confusion(classes: int, rows: list[tuple[int, int]]) -> Confusion:
    matrix = np.zeros((classes, classes), dtype=int)
    for true, predicted in rows:
        matrix[true, predicted] += 1
    return Confusion([f"class {number}" for number in range(classes)], matrix.tolist())


@given(ROWS)
def test_metrics_by_class_are_those_of_scikit_learn(drawn: tuple[int, list[tuple[int, int]]]) -> None:
    classes, rows = drawn
    truth, predicted = zip(*rows, strict=True)
    expected = precision_recall_fscore_support(truth, predicted, labels=range(classes), zero_division=0)
    found = class_metrics(confusion(classes, rows))
    for values, name in zip(expected, ("precision", "recall", "f1", "support"), strict=True):
        assert [getattr(one, name) for one in found] == pytest.approx(list(values))


@given(ROWS)
def test_the_majority_share_is_the_accuracy_of_always_predicting_that_class(
    drawn: tuple[int, list[tuple[int, int]]],
) -> None:
    classes, rows = drawn
    truth = [true for true, _ in rows]
    found = majority(confusion(classes, rows))
    assert found is not None
    assert found.share == pytest.approx(
        max(accuracy_score(truth, [label] * len(rows)) for label in range(classes))
    )


def test_a_matrix_without_rows_has_no_majority() -> None:
    assert majority(Confusion(["a", "b"], [[0, 0], [0, 0]])) is None
