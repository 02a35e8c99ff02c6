"""Regression: mean squared error, Pearson's and Spearman's correlation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsmoothlora.data.examples import Batch, Examples, on_host
from fedsmoothlora.errors import DataError
from fedsmoothlora.modeling.versions import has_values
from fedsmoothlora.tasks.objectives.base import Evaluation
from fedsmoothlora.tasks.objectives.row_logits import RowLogits

_CORRELATIONS = ("pearson", "spearman")


class Regression(RowLogits):
    """Regression by a model that returns one number for each row, ``(rows, 1)`` or ``(rows,)``."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error of the batch, ``mean_i (y_i - f(x_i))^2``."""
        _targets(on_host(batch)["labels"])  # checked where that does not wait
        return functional.mse_loss(_numbers(self._logits(model, batch)).float(), batch["labels"].float())

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The squared error of every row, ``(rows,)``."""
        return (_numbers(self._logits(model, batch)).float() - _targets(batch["labels"])).square()

    def check_labels(self, labels: Tensor) -> None:
        """Raise ``DataError`` for labels that are not one finite number for each row."""
        _targets(labels)

    def lacks(self, metric: str, labels: Callable[[], Tensor | None]) -> bool:
        """Whether the metric is a correlation, and all rows have the same number."""
        if metric not in _CORRELATIONS or (known := labels()) is None:
            return False
        return len(known.unique()) < 2

    def evaluate(
        self, model: nn.Module, examples: Examples, batch_size: int, to_device: Callable[[Batch], Batch]
    ) -> Evaluation:
        """``mse``, which is also the ``loss``, and the correlations ``pearson`` and ``spearman``.

        The correlations are 0 if all predictions are equal, and left out if all targets are. All metrics are
        infinite or not a number if a prediction is not finite.
        """
        from sklearn import metrics  # here, because it takes a while to load

        logits, labels = self._predicted(model, examples, batch_size, to_device)
        predicted, truth = _numbers(logits).double(), _targets(labels).double()
        if not bool(torch.isfinite(predicted).all()):  # which scikit-learn and SciPy refuse
            error = float((truth - predicted).square().mean())
            undefined = {} if len(truth.unique()) < 2 else dict.fromkeys(_CORRELATIONS, math.nan)
            return Evaluation({"loss": error, "mse": error, **undefined})
        error = float(metrics.mean_squared_error(truth.numpy(), predicted.numpy()))
        return Evaluation({"loss": error, "mse": error, **correlations(truth, predicted)})


def correlations(truth: Tensor, predicted: Tensor) -> dict[str, float]:
    """Pearson's and Spearman's correlation of two vectors, ``(rows,)``.

    They are 0 if the predictions are constant. There are none if the targets are: the metric of such rows
    would be 0 for every model.
    """
    from scipy import stats  # here, because it takes a while to load

    if len(truth.unique()) < 2:
        return {}
    if len(predicted.unique()) < 2:
        return dict.fromkeys(_CORRELATIONS, 0.0)
    return {
        "pearson": float(stats.pearsonr(truth.numpy(), predicted.numpy()).statistic),
        "spearman": float(stats.spearmanr(truth.numpy(), predicted.numpy()).statistic),
    }


def _numbers(logits: Tensor) -> Tensor:
    """The predicted number of each row, ``(rows,)``."""
    if logits.ndim == 2 and logits.shape[1] == 1:
        return logits[:, 0]
    if logits.ndim != 1:
        raise DataError(
            f"the model returns {tuple(logits.shape)}: a regression needs one number for each row "
            "(num_labels=1)"
        )
    return logits


def _targets(labels: Tensor) -> Tensor:
    """The labels as float32, ``(rows,)``. Raises ``DataError`` for other shapes and values."""
    if labels.ndim != 1 or labels.is_complex():
        raise DataError(
            f"labels of the shape {tuple(labels.shape)}: a regression needs one number for each row"
        )
    found = labels.float()
    if has_values(found) and not bool(torch.isfinite(found).all()):
        raise DataError("a label is not a finite number")
    return found
