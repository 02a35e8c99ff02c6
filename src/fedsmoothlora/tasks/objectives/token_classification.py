"""Token classification: loss and metrics of the tags of words."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsmoothlora.data.examples import Batch, Examples, on_host
from fedsmoothlora.data.tokens import IGNORED, TokenBudget, by_length, cut
from fedsmoothlora.errors import DataError
from fedsmoothlora.modeling.padding import without_padding_effects
from fedsmoothlora.modeling.versions import has_values
from fedsmoothlora.tasks.objectives.base import Evaluation
from fedsmoothlora.tasks.objectives.class_weights import ClassWeights, class_weights
from fedsmoothlora.tasks.objectives.tokens import mean_of_tokens, shares

_ENTITY_METRICS = ("entity_f1", "entity_precision", "entity_recall")


class TokenClassification:
    """A tag for each word, by a model that returns logits ``(rows, tokens, tags)``.

    A batch's ``labels``, ``(rows, tokens)``, are the number of the word's tag at its first token, and -100
    at its other tokens, at special tokens and at padding, where no loss is taken.

    Args:
        tags: names of the tags, in the order of their numbers.
    """

    def __init__(self, tags: Sequence[str]) -> None:
        self._tags = tuple(tags)
        self._weights: Tensor | None = None  # (tags,), float32

    def weighted(self, labels: Tensor, weights: ClassWeights) -> TokenClassification:
        """The objective of a client whose loss weighs tags; its evaluation does not.

        The formulas are those of `Classification.weighted`, with words in place of rows.

        Args:
            labels: ``(rows, tokens)``, of the client's training rows.
            weights: ``training.class_weights``.
        """
        found = copy.copy(self)
        found._weights = class_weights(labels[labels != IGNORED], weights, self._tags)
        return found

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of all words of the batch, weighted by tag in an objective of `weighted`."""
        logits, labels = self._logits(model, batch)
        weights = None if self._weights is None else self._weights.to(logits.device)
        return functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), weight=weights, ignore_index=IGNORED
        )

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean cross-entropy of every row over its words, ``(rows,)``, without weights."""
        return mean_of_tokens(*self._logits(model, batch))

    def parts(self, batch: Batch, count: int | TokenBudget) -> Sequence[tuple[Batch, float]]:
        """The batch in parts of rows of similar length, each with its share of the words or their weights."""
        return shares(batch, cut(batch, count), self._mass)

    def check_labels(self, labels: Tensor) -> None:
        """Raise ``DataError`` for labels ``(rows, tokens)`` that are not numbers of tags."""
        _check_tags(labels, len(self._tags))

    def lacks(self, metric: str, labels: Callable[[], Tensor | None]) -> bool:
        """Whether the metric is one of entities, and the tags do not mark entities."""
        return metric in _ENTITY_METRICS and not has_entities(self._tags)

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, examples: Examples, batch_size: int, to_device: Callable[[Batch], Batch]
    ) -> Evaluation:
        """``loss`` and ``token_accuracy`` over words, and what `entity_metrics` measures.

        A tag is that of the highest logit at a word's first token.
        """
        model.eval()
        order = by_length(examples, len(examples))
        total, right, words = 0.0, 0, 0
        truth: list[list[str]] = []
        found: list[list[str]] = []
        for first in range(0, len(order), batch_size):
            batch = to_device(examples.batch(order[first : first + batch_size]))
            logits, labels = self._logits(model, batch)
            losses = functional.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
            )
            total += float(losses.double().sum())
            marked, predicted = labels != IGNORED, logits.argmax(dim=-1)
            right += int((predicted == labels)[marked].sum())
            words += int(marked.sum())
            for own, guessed, kept in zip(labels, predicted, marked, strict=True):
                truth.append([self._tags[tag] for tag in own[kept].tolist()])
                found.append([self._tags[tag] for tag in guessed[kept].tolist()])
        metrics = {"loss": total / words, "token_accuracy": right / words}
        return Evaluation(metrics | entity_metrics(truth, found, self._tags), weight=words)

    def _mass(self, batch: Batch) -> float:
        """The number of words, or the sum of their weights."""
        labels = batch["labels"][batch["labels"] != IGNORED]
        return len(labels) if self._weights is None else float(self._weights.double()[labels.cpu()].sum())

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits ``(rows, tokens, tags)``, and the labels of the same tokens."""
        # With the labels, because tokens are moved where padding has to be on the other side.
        inputs: dict[str, Any] = without_padding_effects(model, batch)
        labels = inputs.pop("labels")
        output = model(**inputs)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        _check_tags(on_host(batch)["labels"], logits.shape[-1])
        return logits, labels


def has_entities(tags: Sequence[str]) -> bool:
    """Whether tags mark entities, as IOB and IOBES do: ``O``, and tags such as ``B-PER``."""
    marked = [tag for tag in tags if tag != "O"]
    return bool(marked) and all(tag.startswith(("B-", "I-", "E-", "S-")) for tag in marked)


def entity_metrics(
    truth: Sequence[Sequence[str]], found: Sequence[Sequence[str]], tags: Sequence[str]
) -> dict[str, float]:
    """``entity_f1``, ``entity_precision`` and ``entity_recall`` over all entities, as CoNLL-2003 counts them.

    An entity is right if its first and last word and its type are. Tags that mark no entities, such as parts
    of speech, have none of these metrics, nor have rows without an entity: their F1 would be 0 for every
    model.
    """
    if not has_entities(tags) or all(tag == "O" for row in truth for tag in row):
        return {}
    from seqeval import metrics

    scores = (metrics.f1_score, metrics.precision_score, metrics.recall_score)
    pairs = zip(_ENTITY_METRICS, scores, strict=True)
    return {name: float(score(truth, found, zero_division=0)) for name, score in pairs}


def _check_tags(labels: Tensor, tags: int) -> None:
    """Raise ``DataError`` for labels that are neither numbers of tags nor -100."""
    if labels.is_floating_point() or labels.is_complex() or labels.ndim != 2:
        raise DataError("token classification needs the number of a tag for each token, or -100")
    if not has_values(labels):
        return
    wrong = labels[(labels < 0) & (labels != IGNORED) | (labels >= tags)]
    if len(wrong):
        raise DataError(f"label {int(wrong[0])} in the data: the model has {tags} tags")
