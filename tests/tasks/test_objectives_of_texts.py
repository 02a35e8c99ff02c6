"""Losses and metrics of regression, labels, tags and answers agree with scikit-learn, SciPy and torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics
from torch import Tensor, nn

from fedsmoothlora.data.examples import Vectors
from fedsmoothlora.data.tokens import IGNORED, TaggedWords, Translations
from fedsmoothlora.errors import ConfigError, DataError
from fedsmoothlora.tasks.metrics.generated_text import scores_of
from fedsmoothlora.tasks.objectives import MultiLabel, Regression, TokenClassification
from fedsmoothlora.tasks.objectives.class_weights import WeighsClasses
from fedsmoothlora.tasks.objectives.sequence_to_sequence import SequenceToSequence

FEW = settings(max_examples=30, deadline=None)


class Echo(nn.Module):
    """Returns its inputs as logits."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def same(batch: Any) -> Any:
    return batch


def evaluated(objective: Any, logits: Any, labels: Any, batch_size: int = 3) -> dict[str, float]:
    rows = Vectors(torch.as_tensor(logits), torch.as_tensor(labels))
    found: dict[str, float] = objective.evaluate(Echo(), rows, batch_size, same).metrics
    return found


NUMBERS = st.lists(st.tuples(st.floats(-5, 5, width=32), st.floats(-5, 5, width=32)), min_size=2, max_size=12)


@given(NUMBERS, st.integers(1, 5))
@FEW
def test_regression_has_the_metrics_of_scikit_learn_and_scipy(
    pairs: list[tuple[float, float]], batch_size: int
) -> None:
    predicted, truth = (np.array(column, dtype=np.float32) for column in zip(*pairs, strict=True))
    found = evaluated(Regression(), predicted[:, None], truth, batch_size)
    error = metrics.mean_squared_error(truth.astype(float), predicted.astype(float))
    assert found["mse"] == found["loss"] == pytest.approx(error, abs=1e-9)
    if len(set(truth)) > 1 and len(set(predicted)) > 1:
        wanted = stats.pearsonr(truth.astype(float), predicted.astype(float)).statistic
        assert found["pearson"] == pytest.approx(wanted, abs=1e-6, nan_ok=True)
        assert found["spearman"] == pytest.approx(stats.spearmanr(truth, predicted).statistic, abs=1e-9)
    elif len(set(truth)) > 1:
        assert (found["pearson"], found["spearman"]) == (0.0, 0.0)
    else:  # 0 for every model
        assert set(found) == {"loss", "mse"}
    batch = {"inputs": torch.as_tensor(predicted)[:, None], "labels": torch.as_tensor(truth)}
    assert float(Regression().loss(Echo(), batch)) == pytest.approx(error, rel=1e-4, abs=1e-6)


def test_a_regression_refuses_several_outputs_and_labels_that_are_no_numbers() -> None:
    with pytest.raises(DataError, match="one number for each row"):
        evaluated(Regression(), torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(DataError, match="not a finite number"):
        Regression().check_labels(torch.tensor([1.0, math.nan]))
    with pytest.raises(DataError, match="one number for each row"):
        Regression().check_labels(torch.zeros(3, 2))


@given(st.data(), st.integers(1, 9), st.integers(2, 4))
@FEW
def test_several_labels_have_the_metrics_of_scikit_learn(data: st.DataObject, rows: int, labels: int) -> None:
    cells = st.lists(st.booleans(), min_size=labels, max_size=labels)
    truth = np.array(data.draw(st.lists(cells, min_size=rows, max_size=rows)))
    numbers = st.lists(st.floats(-3, 3, width=32), min_size=labels, max_size=labels)
    logits = np.array(data.draw(st.lists(numbers, min_size=rows, max_size=rows)), dtype=np.float32)
    predicted = logits > 0
    found = evaluated(MultiLabel(), logits, truth.astype(np.float32))
    loss = nn.functional.binary_cross_entropy_with_logits(
        torch.as_tensor(logits), torch.tensor(truth).float()
    )
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    if not truth.any():  # nothing to find: F1 would be 0 for every model
        assert set(found) == {"loss"}
        return
    micro = metrics.f1_score(truth, predicted, average="micro", zero_division=0.0)
    assert found["micro_f1"] == pytest.approx(micro)
    seen = (truth | predicted).any(axis=0)
    each = metrics.f1_score(truth, predicted, average=None, zero_division=0.0)
    assert found["macro_f1"] == pytest.approx(each[seen].mean())
    known = np.flatnonzero(truth.any(axis=0))
    wanted = [metrics.average_precision_score(truth[:, k], logits[:, k]) for k in known]
    assert found["mean_average_precision"] == pytest.approx(np.mean(wanted))


def test_weights_of_labels_are_those_of_bce_with_logits_loss() -> None:
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 0]])
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    objective = MultiLabel(names=("a", "b", "c"))
    assert isinstance(objective, WeighsClasses)
    for weights, positive in (
        ("balanced", [3.0, 1.0, 1.0]),
        ({"a": 2.0, "b": 1.0, "c": 5.0}, [2.0, 1.0, 5.0]),
    ):
        wanted = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(positive))(logits, labels)
        got = objective.weighted(labels, weights).loss(Echo(), {"inputs": logits, "labels": labels})
        torch.testing.assert_close(got, wanted)
    with pytest.raises(ConfigError, match="no weight for the class 'c'"):
        objective.weighted(labels, {"a": 1.0, "b": 1.0})


@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=1, max_size=6))
@FEW
def test_balanced_weights_let_every_label_be_learned(rows: list[list[bool]]) -> None:
    labels = torch.tensor(rows).float()
    logits = torch.zeros(len(rows), 2, requires_grad=True)
    MultiLabel().weighted(labels, "balanced").loss(Echo(), {"inputs": logits, "labels": labels}).backward()
    assert logits.grad is not None
    assert bool((logits.grad != 0).all())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_have_metrics_that_are_not(wrong: float) -> None:
    found = evaluated(Regression(), torch.tensor([wrong, 1.0, 2.0])[:, None], torch.arange(3.0))
    assert not any(math.isfinite(value) for value in found.values())
    logits = torch.tensor([[wrong, 1.0], [0.5, -1.0]])
    found = evaluated(MultiLabel(), logits, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert "mean_average_precision" not in found
    assert 0 <= found["micro_f1"] <= 1


def test_labels_other_than_0_and_1_are_refused() -> None:
    with pytest.raises(DataError, match="neither 0 nor 1"):
        MultiLabel().check_labels(torch.tensor([[0.0, 2.0]]))
    with pytest.raises(DataError, match="2 for each row"):
        evaluated(MultiLabel(), torch.zeros(2, 2), torch.zeros(2, 3))


# -- tags --------------------------------------------------------------------------------------------

TAGS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


class Tagger(nn.Module):
    """Gives each token the logits that its number names."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.logits[input_ids])


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The entities of IOB2 tags, as first and last word and type; an ``I-`` without its ``B-`` begins one."""
    found, start, kind = set(), None, ""
    for place, tag in enumerate([*tags, "O"]):
        if start is not None and not (tag[:2] == "I-" and tag[2:] == kind):
            found.add((start, place - 1, kind))
            start = None
        if tag != "O" and start is None:
            start, kind = place, tag[2:]
    return found


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=7),
        min_size=1,
        max_size=5,
    )
)
@FEW
def test_entities_are_counted_by_first_and_last_word_and_type(rows: list[list[tuple[int, int]]]) -> None:
    """A token's number is the tag that is predicted; every second token belongs to no word."""
    ids = [[number for guess, _ in row for number in (guess, 0)] for row in rows]
    labels = [[label for _, tag in row for label in (tag, IGNORED)] for row in rows]
    model = Tagger(torch.eye(5) * 4)
    found = TokenClassification(TAGS).evaluate(model, TaggedWords(ids, labels, 0), 2, same)
    wanted = [entities([TAGS[tag] for _, tag in row]) for row in rows]
    guessed = [entities([TAGS[guess] for guess, _ in row]) for row in rows]
    hits = [guess == tag for row in rows for guess, tag in row]
    assert found.metrics["token_accuracy"] == pytest.approx(np.mean(hits))
    assert found.weight == len(hits)
    if not any(wanted):  # nothing to find: F1 would be 0 for every model
        assert set(found.metrics) == {"loss", "token_accuracy"}
        return
    right = sum(len(a & b) for a, b in zip(wanted, guessed, strict=True))
    counts = {"entity_precision": sum(map(len, guessed)), "entity_recall": sum(map(len, wanted))}
    for name, count in counts.items():
        assert found.metrics[name] == pytest.approx(right / count if count else 0.0)
    assert found.metrics["entity_f1"] == pytest.approx(2 * right / sum(counts.values()))


def test_tags_that_mark_no_entities_have_no_metrics_of_entities() -> None:
    rows = TaggedWords([[0, 1]], [[0, 1]], 0)
    found = TokenClassification(("NOUN", "VERB")).evaluate(Tagger(torch.eye(2)), rows, 2, same)
    assert found.metrics.keys() == {"loss", "token_accuracy"}
    assert found.metrics["token_accuracy"] == 1.0


@pytest.mark.parametrize(
    "weights", [None, "balanced", {"a": 1.0, "b": 3.0}], ids=["none", "balanced", "table"]
)
def test_the_loss_of_tags_is_the_sum_of_its_parts(weights: Any) -> None:
    ids = [[0, 1, 2, 0], [1, 1], [2, 0, 1], [0]]
    labels = [[0, 1, IGNORED, 0], [1, IGNORED], [0, 1, 1], [1]]
    rows = TaggedWords(ids, labels, 0)
    model = Tagger(torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))
    objective: Any = TokenClassification(("a", "b"))
    if weights is not None:
        assert isinstance(objective, WeighsClasses)
        objective = objective.weighted(rows.labels, weights)
    batch = rows.batch(range(4))
    whole = objective.loss(model, batch)
    parts = objective.parts(batch, 3)
    assert len(parts) == 3
    torch.testing.assert_close(sum(share * objective.loss(model, part) for part, share in parts), whole)


# -- answers -----------------------------------------------------------------------------------------


class Copier(nn.Module):
    """Logits that depend on the decoder's token and on the number of the encoder's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        shifted = labels.new_zeros(labels.shape)
        shifted[:, 1:] = labels[:, :-1]
        return shifted.masked_fill(shifted == IGNORED, 0)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, use_cache: bool
    ) -> Any:
        return SimpleNamespace(logits=self.table[decoder_input_ids] * attention_mask.sum(1)[:, None, None])


def test_the_loss_of_answers_is_the_sum_of_its_parts_and_that_of_an_evaluation() -> None:
    sources = [[1, 2, 3, 4, 5], [1], [2, 3], [4, 5, 6]]
    targets = [[1, 2], [3, 4, 5, 6, 7], [1], [2, 2, 2]]
    rows, objective, model = Translations(sources, targets, 0), SequenceToSequence(), Copier()
    batch = rows.batch(range(4))
    whole = objective.loss(model, batch)
    parts = objective.parts(batch, 2)
    assert [part["labels"].shape for part, _ in parts] == [(2, 5), (2, 3)]
    assert [part["input_ids"].shape for part, _ in parts] == [(2, 2), (2, 5)]
    torch.testing.assert_close(sum(share * objective.loss(model, part) for part, share in parts), whole)
    for batch_size in (1, 3):
        found = objective.evaluate(model, rows, batch_size, same)
        assert found.metrics["loss"] == pytest.approx(float(whole), rel=1e-5)
        assert found.metrics["perplexity"] == pytest.approx(math.exp(float(whole)), rel=1e-4)
        assert found.weight == 11


def test_scores_of_answers_are_known_for_easy_cases() -> None:
    scores = ("rouge", "bleu", "exact-match")
    right = ["the cat sat on the mat", "a dog"]
    names = {"rouge1", "rouge2", "rougeL", "bleu", "exact_match"}
    assert scores_of(right, right, scores) == pytest.approx(dict.fromkeys(names, 1.0))
    wrong = scores_of(["no", "nothing"], right, scores)
    assert wrong == pytest.approx(dict.fromkeys(names, 0.0), abs=0.02)
    half = scores_of(["the cat", "a dog"], right, ("rouge",))
    # 2 of 2 words found, 2 of 6 wanted: F1 = 1/2 for the first row, 1 for the second
    assert half["rouge1"] == pytest.approx((0.5 + 1) / 2)
    assert half.keys() == {"rouge1", "rouge2", "rougeL"}
