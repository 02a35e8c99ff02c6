"""Single-label classification: accuracy, loss, macro-F1, AUROC, confusion."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsmoothlora.data.examples import Batch, Examples, on_host
from fedsmoothlora.data.tokens import TokenBudget, cut
from fedsmoothlora.errors import DataError
from fedsmoothlora.modeling.versions import has_values
from fedsmoothlora.tasks.objectives.base import Evaluation
from fedsmoothlora.tasks.objectives.class_weights import ClassWeights, class_weights
from fedsmoothlora.tasks.objectives.row_logits import RowLogits


class Classification(RowLogits):
    """Single-label classification by a model that returns logits ``(rows, classes)``.

    Args:
        arguments, head: as in `RowLogits`.
        classes: names of the classes, for tables of class weights; the numbers 0, 1, ... unless given.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any] = MappingProxyType({}),
        *,
        head: str | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__(arguments, head=head)
        self._classes = tuple(classes)
        self._weights: Tensor | None = None  # (classes,), float32

    def weighted(self, labels: Tensor, weights: ClassWeights) -> Classification:
        """The objective of a client whose loss weighs classes; its evaluation does not.

        The loss of a batch is ``sum_i w_i l_i / sum_i w_i``, where ``l_i`` is the cross-entropy of row ``i``
        and ``w_i`` the weight of its class, as ``CrossEntropyLoss(weight)`` of torch computes it.

        Args:
            labels: ``(rows,)``, the classes of the client's training rows.
            weights: ``training.class_weights``.

        Raises:
            ConfigError: a table of weights lacks a class or names an unknown one.
            DataError: a label is not the number of a class.
        """
        found = copy.copy(self)
        found._weights = class_weights(_class_numbers(labels), weights, self._classes)
        return found

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the batch, weighted by class in an objective that `weighted` returned."""
        logits = self._logits(model, batch)
        _class_numbers(on_host(batch)["labels"], logits.shape[-1])  # checked where that does not wait
        labels = batch["labels"].long()
        weights = self._weights
        if weights is not None:  # the last classes may be missing from it
            weights = functional.pad(weights, (0, logits.shape[-1] - len(weights))).to(logits.device)
        return self.criterion(logits.float(), labels, weights)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of every row, ``(rows,)``, without weights: those of a batch are relative to its rows."""
        logits = self._logits(model, batch).float()
        labels = _class_numbers(batch["labels"], logits.shape[-1])
        # Row by row, so that it is right for the criterion of a subclass too.
        rows = zip(logits.split(1), labels.split(1), strict=True)
        return torch.stack([self.criterion(*row, None) for row in rows])

    def criterion(self, logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        """The loss of a batch from its logits; a subclass with another loss overrides this method.

        Args:
            logits: ``(rows, classes)``, float32.
            labels: ``(rows,)``, int64.
            weights: ``(classes,)``, float32; None if classes are not weighted.
        """
        return functional.cross_entropy(logits, labels, weight=weights)

    def parts(self, batch: Batch, count: int | TokenBudget) -> Sequence[tuple[Batch, float]]:
        """The batch in parts, each with its share of the rows, or of the sum of their weights."""
        whole = self._mass(batch)
        return [(part, self._mass(part) / whole) for part in cut(batch, count)]

    def check_labels(self, labels: Tensor) -> None:
        """Raise ``DataError`` for labels ``(rows,)`` that are not numbers of classes."""
        _class_numbers(labels)

    def lacks(self, metric: str, labels: Callable[[], Tensor | None]) -> bool:
        """Whether the metric is ``auroc`` and a class has no row, or it is ``mcc`` and all have one class."""
        least = {"auroc": max(len(self._classes), 2), "mcc": 2}.get(metric)
        if least is None or (known := labels()) is None:
            return False
        return len(known.unique()) < least

    def _mass(self, batch: Batch) -> float:
        """The number of rows, or the sum of their weights."""
        labels = batch["labels"]
        if self._weights is None:
            return len(labels)
        return float(self._weights.double()[_class_numbers(labels, len(self._weights)).cpu()].sum())

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, examples: Examples, batch_size: int, to_device: Callable[[Batch], Batch]
    ) -> Evaluation:
        """``accuracy``, mean cross-entropy ``loss``, ``macro_f1``; if defined, ``mcc`` and ``auroc``.

        Macro F1 is the mean over the classes that occur or are predicted. The Matthews correlation
        coefficient is 0 if only one class is predicted, and undefined if only one occurs. No metric weighs
        classes.
        Precision, recall and support of each class, and the share of the largest class, follow from the
        confusion matrix.
        """
        from sklearn import metrics  # here, because it takes a while to load

        logits, labels = self._predicted(model, examples, batch_size, to_device)
        truth = _class_numbers(labels, logits.shape[-1])
        predicted = logits.argmax(dim=-1)
        found = {
            "accuracy": float(metrics.accuracy_score(truth.numpy(), predicted.numpy())),
            "loss": float(functional.cross_entropy(logits.double(), truth)),
            "macro_f1": float(metrics.f1_score(truth.numpy(), predicted.numpy(), average="macro")),
        }
        if (correlation := matthews_correlation(truth, predicted)) is not None:
            found["mcc"] = correlation
        if (area := auroc(logits.double().softmax(dim=-1), truth)) is not None:
            found["auroc"] = area
        confusion = metrics.confusion_matrix(
            truth.numpy(), predicted.numpy(), labels=range(logits.shape[-1])
        )  # (classes, classes)
        return Evaluation(found, torch.from_numpy(confusion))


def _class_numbers(labels: Tensor, classes: int | None = None) -> Tensor:
    """The labels as int64.

    Args:
        labels: ``(rows,)``, integers or truth values.
        classes: the number of logits, if it is known.

    Raises ``DataError`` for other types and shapes, and for labels without a logit.
    """
    if labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"the labels are {labels.dtype}: classification needs the number of a class, an integer. If they "
            "are such numbers, convert them with .long(); for other targets, pass an objective with its own "
            "loss (Federation(objective=...))"
        )
    if labels.ndim != 1:
        raise DataError(
            f"labels of the shape {tuple(labels.shape)}: classification needs one class for each row"
        )
    if not has_values(labels):
        return labels
    labels = labels.long()
    wrong = labels[(labels < 0) | (labels >= (torch.inf if classes is None else classes))]
    if len(wrong):
        logits = (
            "" if classes is None else f" the model has {classes} logits, for labels from 0 to {classes - 1}"
        )
        raise DataError(f"label {int(wrong[0])} in the data:{logits or ' a class has a number from 0'}")
    return labels


def matthews_correlation(truth: Tensor, predicted: Tensor) -> float | None:
    """The Matthews correlation of classes ``(rows,)`` and predictions.

    It is 0 if the predictions are constant, and None if the classes are: it would be 0 for every model.
    """
    from sklearn import metrics  # here, because it takes a while to load

    if len(truth.unique()) < 2:
        return None
    return float(metrics.matthews_corrcoef(truth.numpy(), predicted.numpy()))


def auroc(scores: Tensor, truth: Tensor) -> float | None:
    """Area under the ROC curve, ``P(score of a positive > score of a negative) + P(equal) / 2``.

    With two classes, it is the area of the second class's score. With more, it is the mean over classes of
    one class against the rest (macro average).

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
