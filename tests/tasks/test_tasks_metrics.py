"""Metrics against their definitions, by counting."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsmoothlora.data.examples import Vectors
from fedsmoothlora.tasks.objectives import Classification, Evaluation, auroc


@st.composite
def predictions(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """A number of classes, and predicted and true ones of some rows."""
    classes = draw(st.integers(2, 5))
    rows = draw(st.integers(1, 12))
    labels = st.lists(st.integers(0, classes - 1), min_size=rows, max_size=rows)
    return classes, draw(labels), draw(labels)


@st.composite
def scored(draw: st.DrawFn, classes: int | None = None) -> tuple[list[list[int]], list[int]]:
    """Scores with many ties, and true classes, each of which occurs."""
    classes = classes or draw(st.integers(2, 4))
    more = draw(st.lists(st.integers(0, classes - 1), max_size=8))
    truth = draw(st.permutations([*range(classes), *more]))
    row = st.lists(st.integers(-3, 3), min_size=classes, max_size=classes)
    return draw(st.lists(row, min_size=len(truth), max_size=len(truth))), list(truth)


def counted_f1(classes: int, predicted: list[int], truth: list[int]) -> float:
    """By precision and recall."""
    scores = []
    for label in range(classes):
        hits = sum(p == label == t for p, t in zip(predicted, truth, strict=True))
        said, there = predicted.count(label), truth.count(label)
        if not said and not there:
            continue
        if not hits:
            scores.append(Fraction(0))
            continue
        precision, recall = Fraction(hits, said), Fraction(hits, there)
        scores.append(2 * precision * recall / (precision + recall))
    return float(sum(scores) / len(scores)) if scores else 0.0


def by_pairs(scores: list[list[Any]], truth: list[int], label: int) -> float:
    """``P(score of a positive > score of a negative) + P(equal) / 2`` over all pairs."""
    inside = [row[label] for row, t in zip(scores, truth, strict=True) if t == label]
    outside = [row[label] for row, t in zip(scores, truth, strict=True) if t != label]
    wins = sum(Fraction(int(p > n)) + Fraction(int(p == n), 2) for p in inside for n in outside)
    return float(wins / (len(inside) * len(outside)))


def evaluate(classes: int, predicted: list[int], truth: list[int]) -> Evaluation:
    """The evaluation of a model that predicts just this."""
    logits = nn.functional.one_hot(torch.tensor(predicted), classes).float()
    rows = Vectors(logits, torch.tensor(truth))
    return Classification().evaluate(nn.Identity(), rows, 5, lambda batch: batch)


@settings(deadline=None)
@given(predictions())
def test_the_confusion_matrix_counts_rows_by_true_and_predicted_class(
    drawn: tuple[int, list[int], list[int]],
) -> None:
    classes, predicted, truth = drawn
    pairs = list(zip(truth, predicted, strict=True))
    wanted = [[pairs.count((true, said)) for said in range(classes)] for true in range(classes)]
    found = evaluate(*drawn).confusion
    assert found is not None
    assert found.tolist() == wanted
    assert found.dtype == torch.int64


@settings(deadline=None)
@given(predictions())
def test_accuracy_is_the_exact_share_of_hits(drawn: tuple[int, list[int], list[int]]) -> None:
    _, predicted, truth = drawn
    hits = sum(p == t for p, t in zip(predicted, truth, strict=True))
    assert evaluate(*drawn).metrics["accuracy"] == hits / len(truth)


@settings(deadline=None)
@given(predictions())
def test_macro_f1_is_the_mean_over_classes_of_precisions_and_recalls_harmonic_mean(
    drawn: tuple[int, list[int], list[int]],
) -> None:
    assert evaluate(*drawn).metrics["macro_f1"] == pytest.approx(counted_f1(*drawn), abs=1e-12)


def test_macro_f1_ignores_absent_classes_unless_they_are_predicted() -> None:
    assert evaluate(3, [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]).metrics["macro_f1"] == 1.0
    found = evaluate(3, [0, 0, 2, 2, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]).metrics["macro_f1"]
    assert found == pytest.approx((2 / 3 + 1 + 0) / 3)


@settings(deadline=None)
@given(scored(classes=2))
def test_auroc_of_two_classes_is_the_share_of_pairs_in_order_of_the_seconds_score(
    drawn: tuple[list[list[int]], list[int]],
) -> None:
    scores, truth = drawn
    got = auroc(torch.tensor(scores, dtype=torch.float64), torch.tensor(truth))
    assert got == pytest.approx(by_pairs(scores, truth, 1), abs=1e-12)


@settings(deadline=None)
@given(scored())
def test_auroc_of_more_classes_is_the_mean_of_each_against_the_rest(
    drawn: tuple[list[list[int]], list[int]],
) -> None:
    scores, truth = drawn
    labels = [1] if len(scores[0]) == 2 else list(range(len(scores[0])))
    wanted = sum(by_pairs(scores, truth, label) for label in labels) / len(labels)
    got = auroc(torch.tensor(scores, dtype=torch.float64), torch.tensor(truth))
    assert got == pytest.approx(wanted, abs=1e-12)


def test_auroc_of_many_rows_loses_no_digits() -> None:
    """An area of exactly one half: every score twice, once in each class."""
    scores = torch.arange(300_001, dtype=torch.float64).repeat(2)
    truth = torch.arange(2).repeat_interleave(300_001)
    assert auroc(torch.stack([-scores, scores], dim=1), truth) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(
    ("scores", "truth"),
    [
        ([[1, 0], [0, 1]], [0, 0]),
        ([[1, 0], [0, 1]], [1, 1]),
        ([[1, 0, 0], [0, 1, 0]], [0, 1]),
        ([[1], [2]], [0, 0]),
        ([[1, 0], [0, math.nan]], [0, 1]),
        ([[1, 0], [0, math.inf]], [0, 1]),
    ],
    ids=["no positive", "no negative", "a class without rows", "one class", "nan", "infinite"],
)
def test_auroc_is_none_where_it_is_undefined(scores: list[list[float]], truth: list[int]) -> None:
    assert auroc(torch.tensor(scores), torch.tensor(truth)) is None


def test_mcc_is_the_correlation_of_two_classes_and_0_for_a_constant_guess() -> None:
    truth, predicted = [0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]
    found = evaluate(2, truth, predicted).metrics["mcc"]
    assert found == pytest.approx(float(np.corrcoef(truth, predicted)[0, 1]))
    assert evaluate(2, [1, 1, 1], [0, 1, 1]).metrics["mcc"] == 0.0
    assert "mcc" not in evaluate(2, [0, 1, 1], [1, 1, 1]).metrics  # one class: 0 for every model
