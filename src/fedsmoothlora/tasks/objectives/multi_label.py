"""Multi-label classification: binary cross-entropy, F1 and mean average precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsmoothlora.data.examples import Batch, Examples, on_host
from fedsmoothlora.errors import DataError
from fedsmoothlora.modeling.versions import has_values
from fedsmoothlora.tasks.objectives.base import Evaluation
from fedsmoothlora.tasks.objectives.class_weights import ClassWeights, check_names
from fedsmoothlora.tasks.objectives.row_logits import RowLogits


class MultiLabel(RowLogits):
    """Any number of labels for each row, by a model that returns logits ``(rows, labels)``.

    A batch's ``labels`` are 1 for the labels of a row and 0 for others, ``(rows, labels)``. A label is
    predicted if its logit is above 0, which is a probability above one half.

    Args:
        arguments, head: as in `RowLogits`.
        names: names of the labels, for tables of weights; the numbers 0, 1, ... unless given.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any] = MappingProxyType({}),
        *,
        head: str | None = None,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__(arguments, head=head)
        self._names = tuple(names)
        self._weights: Tensor | None = None  # (labels,), float32

    def weighted(self, labels: Tensor, weights: ClassWeights) -> MultiLabel:
        """The objective of a client whose loss weighs the rows that have a label; its evaluation does not.

        The term of a label in a row that has it is multiplied by the label's weight, as ``pos_weight`` of
        ``BCEWithLogitsLoss``. ``balanced`` is the number of the client's rows without the label divided by
        the number of those with it. It is 1 for a label that no row has, and for a label that all rows have:
        the weight 0 would keep the client from learning it.

        Args:
            labels: ``(rows, labels)``, of the client's training rows.
            weights: ``training.class_weights``.

        Raises ``ConfigError`` if a table of weights lacks a label or names an unknown one.
        """
        found = copy.copy(self)
        found._weights = _positive_weights(_targets(labels), weights, self._names)
        return found

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean binary cross-entropy over the rows and labels of the batch."""
        logits = self._logits(model, batch).float()
        weights = None if self._weights is None else self._weights.to(logits.device)
        _targets(on_host(batch)["labels"], logits.shape[-1])  # checked where that does not wait
        targets = batch["labels"].float()
        return functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean binary cross-entropy of every row over its labels, ``(rows,)``, without weights."""
        logits = self._logits(model, batch).float()
        targets = _targets(batch["labels"], logits.shape[-1])
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)

    def check_labels(self, labels: Tensor) -> None:
        """Raise ``DataError`` for labels other than 0 and 1 for each row and label."""
        _targets(labels)

    def lacks(self, metric: str, labels: Callable[[], Tensor | None]) -> bool:
        """Whether no row has a label, and the metric is not the loss."""
        if metric == "loss" or (known := labels()) is None:
            return False
        return not bool(known.any())

    def evaluate(
        self, model: nn.Module, examples: Examples, batch_size: int, to_device: Callable[[Batch], Batch]
    ) -> Evaluation:
        """``loss`` and, if any row has a label, ``micro_f1``, ``macro_f1`` and ``mean_average_precision``.

        Micro F1 counts all pairs of row and label alike; macro F1 is the mean over the labels that occur or
        are predicted. Mean average precision is the mean over the labels that occur; it is left out if a
        logit is not finite. No metric weighs labels. Rows without any label have only a loss: their F1 would
        be 0 for every model.
        """
        from sklearn import metrics  # here, because it takes a while to load

        logits, labels = self._predicted(model, examples, batch_size, to_device)
        targets = _targets(labels, logits.shape[-1])
        loss = functional.binary_cross_entropy_with_logits(logits.double(), targets.double())
        if not bool(targets.any()):
            return Evaluation({"loss": float(loss)})
        truth, predicted = targets.int().numpy(), (logits > 0).int().numpy()

        def f1(wanted: Any, guessed: Any) -> float:
            return float(metrics.f1_score(wanted, guessed, zero_division=0.0))

        # Label by label, because scikit-learn reads a single column as two classes.
        labels_seen = np.flatnonzero((truth | predicted).any(axis=0))
        each = [f1(truth[:, label], predicted[:, label]) for label in labels_seen]
        areas = [
            float(metrics.average_precision_score(truth[:, label], logits[:, label].double().numpy()))
            for label in np.flatnonzero(truth.any(axis=0))
            if bool(torch.isfinite(logits).all())
        ]
        found = {
            "loss": float(loss),
            "micro_f1": f1(truth.ravel(), predicted.ravel()),
            "macro_f1": fmean(each),
        }
        return Evaluation(found | ({"mean_average_precision": fmean(areas)} if areas else {}))


def _targets(labels: Tensor, width: int | None = None) -> Tensor:
    """The labels as float32, ``(rows, labels)``. Raises ``DataError`` for other shapes and values."""
    if labels.ndim != 2 or (width is not None and labels.shape[1] != width):
        wanted = "one for each row and label" if width is None else f"{width} for each row"
        raise DataError(f"labels of the shape {tuple(labels.shape)}: multi-label data need {wanted}")
    if has_values(labels) and not bool(((labels == 0) | (labels == 1)).all()):
        raise DataError("a label of multi-label data is neither 0 nor 1")
    return labels.float()


def _positive_weights(targets: Tensor, weights: ClassWeights, names: Sequence[str]) -> Tensor:
    """The weight of every label in rows that have it, ``(labels,)``, float32."""
    if isinstance(weights, Mapping):
        known = names or [str(label) for label in range(targets.shape[1])]
        check_names(weights, known, known=known)
        return torch.tensor([weights[name] for name in known], dtype=torch.float32)
    having = targets.double().sum(dim=0)
    lacking = len(targets) - having
    return torch.where((having > 0) & (lacking > 0), lacking / having.clamp(min=1), 1.0).float()
