"""Single-label classification: accuracy, loss, macro-F1, AUROC, confusion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsmoothlora.data.examples import Batch, Examples
from fedsmoothlora.data.tokens import by_length, cut
from fedsmoothlora.errors import DataError
from fedsmoothlora.tasks.interface import Evaluation


class Classification:
    """Single-label classification by a model that returns logits ``(samples, classes)``.

    A batch holds ``labels`` and the model's inputs: one tensor called ``inputs`` is passed by position,
    others by their names. The model returns the logits, or an object that has them as ``logits``.

    Args:
        arguments: given to the model with every batch.
        head: a module that is given the batch in the model's place, where the batch holds what the rest of
            the model would hand to it.
    """

    def __init__(
        self, arguments: Mapping[str, Any] = MappingProxyType({}), *, head: str | None = None
    ) -> None:
        self._arguments = dict(arguments)
        self._head = head

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the batch."""
        logits = self._logits(model, batch)
        _check_labels(batch["labels"], logits.shape[-1])
        return functional.cross_entropy(logits.float(), batch["labels"])

    def parts(self, batch: Batch, count: int) -> Sequence[tuple[Batch, float]]:
        """The batch in parts, each with its share of the rows."""
        rows = len(batch["labels"])
        return [(part, len(part["labels"]) / rows) for part in cut(batch, count)]

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, examples: Examples, batch_size: int, to_device: Callable[[Batch], Batch]
    ) -> Evaluation:
        """``accuracy``, mean cross-entropy ``loss``, ``macro_f1`` and, where it is defined, ``auroc``."""
        model.eval()
        rows = len(examples)
        order = by_length(examples, rows)
        parts, labels = [], []
        for first in range(0, rows, batch_size):
            batch = to_device(examples.batch(order[first : first + batch_size]))
            parts.append(self._logits(model, batch).float().cpu())
            labels.append(batch["labels"].cpu())
        logits, truth = torch.cat(parts), torch.cat(labels)
        _check_labels(truth, logits.shape[-1])
        confusion = confusion_matrix(logits.argmax(dim=-1), truth, logits.shape[-1])
        figures = {
            "accuracy": float(confusion.diagonal().sum()) / rows,
            "loss": float(functional.cross_entropy(logits.double(), truth)),
            "macro_f1": macro_f1(confusion),
        }
        area = auroc(logits.double().softmax(dim=-1), truth)
        if area is not None:
            figures["auroc"] = area
        return Evaluation(figures, confusion)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        if self._head is not None:
            model = model.get_submodule(self._head)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if list(inputs) == ["inputs"]:
            output = model(inputs["inputs"], **self._arguments)
        else:
            output = model(**inputs, **self._arguments)
        return output if isinstance(output, Tensor) else output.logits


def _check_labels(labels: Tensor, classes: int) -> None:
    """Raise ``DataError`` for a label that the model has no logit for."""
    if labels.is_meta:  # shapes alone are of interest
        return
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise DataError(
            f"label {int(wrong[0])} in the data: the model has {classes} logits, "
            f"for labels from 0 to {classes - 1}"
        )


def confusion_matrix(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Rows by true class (first axis) and predicted class, ``(classes, classes)``, int64."""
    return torch.bincount(truth * classes + predicted, minlength=classes**2).view(classes, classes)


def macro_f1(confusion: Tensor) -> float:
    """Mean over classes of ``F1 = 2 TP / (2 TP + FP + FN)``.

    Classes that neither occur nor are predicted are left out.
    """
    hits = confusion.diagonal().double()
    either = confusion.sum(dim=0) + confusion.sum(dim=1)  # 2 TP + FP + FN
    met = either > 0
    return float((2 * hits[met] / either[met]).mean()) if bool(met.any()) else 0.0


def auroc(scores: Tensor, truth: Tensor) -> float | None:
    """Area under the ROC curve, ``P(score of a positive > score of a negative) + P(equal) / 2``.

    Two classes: of the second's score. More: the mean over classes of one against the rest (macro). By
    ranks (Mann-Whitney), so ties count half.

    Args:
        scores: ``(rows, classes)``.
        truth: ``(rows,)``.

    Returns:
        The area; None where it is undefined: a class has no rows, or all of them, or a score is not finite.
    """
    classes = scores.shape[1]
    counts = torch.bincount(truth, minlength=classes)
    if classes < 2 or bool((counts == 0).any()) or not bool(torch.isfinite(scores).all()):
        return None
    areas = []
    for label in [1] if classes == 2 else range(classes):
        _, group, sizes = scores[:, label].unique(return_inverse=True, return_counts=True)
        ranks = sizes.cumsum(0) - (sizes - 1) / 2  # mean rank of equal scores, from 1
        positive = truth == label
        hits, misses = int(positive.sum()), int((~positive).sum())
        above = float(ranks[group[positive]].double().sum()) - hits * (hits + 1) / 2
        areas.append(above / (hits * misses))
    return sum(areas) / len(areas)
