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
from fedsmoothlora.modeling.padding import without_padding_effects
from fedsmoothlora.tasks.objectives.base import Evaluation


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
        """``accuracy``, mean cross-entropy ``loss``, ``macro_f1`` and, where it is defined, ``auroc``.

        Macro F1 is the mean over the classes that occur or are predicted.
        """
        from sklearn import metrics  # here, because it takes a while to load

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
        predicted = logits.argmax(dim=-1)
        figures = {
            "accuracy": float(metrics.accuracy_score(truth.numpy(), predicted.numpy())),
            "loss": float(functional.cross_entropy(logits.double(), truth)),
            "macro_f1": float(metrics.f1_score(truth.numpy(), predicted.numpy(), average="macro")),
        }
        area = auroc(logits.double().softmax(dim=-1), truth)
        if area is not None:
            figures["auroc"] = area
        confusion = metrics.confusion_matrix(
            truth.numpy(), predicted.numpy(), labels=range(logits.shape[-1])
        )  # (classes, classes)
        return Evaluation(figures, torch.from_numpy(confusion))

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        if self._head is not None:
            model = model.get_submodule(self._head)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if list(inputs) == ["inputs"]:
            output = model(inputs["inputs"], **self._arguments)
        else:
            output = model(**without_padding_effects(model, inputs), **self._arguments)
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


def auroc(scores: Tensor, truth: Tensor) -> float | None:
    """Area under the ROC curve, ``P(score of a positive > score of a negative) + P(equal) / 2``.

    With two classes, the area of the second class's score. With more, the mean over classes of one against
    the rest (macro average).

    Args:
        scores: ``(rows, classes)``.
        truth: ``(rows,)``.

    Returns:
        The area; None where it is undefined: a class has no rows, or all of them, or a score is not finite.
    """
    from sklearn import metrics  # here, because it takes a while to load

    classes = scores.shape[1]
    counts = torch.bincount(truth, minlength=classes)
    if classes < 2 or bool((counts == 0).any()) or not bool(torch.isfinite(scores).all()):
        return None
    if classes == 2:
        return float(metrics.roc_auc_score(truth.numpy(), scores[:, 1].numpy()))
    # As indicators: with labels, scikit-learn asks for scores that are probabilities.
    return float(metrics.roc_auc_score(functional.one_hot(truth).numpy(), scores.numpy(), average="macro"))
