"""The interface of an objective: a loss, its parts, and an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from fedsmoothlora.data.examples import Batch, Examples
from fedsmoothlora.data.tokens import TokenBudget


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a model.

    Attributes:
        metrics: metrics by name: ``loss``, and others of the objective.
        confusion: numbers of rows by true and predicted class, ``(classes, classes)``, if there are classes.
        weight: number of units that the metrics are means over, such as tokens; the number of rows unless
            given.
    """

    metrics: dict[str, float]
    confusion: Tensor | None = None
    weight: float | None = None


class Objective(Protocol):
    """The loss that a model is trained on, and its evaluation.

    An objective may also have ``check_labels(labels)``, which raises ``DataError`` for labels that the loss
    cannot use, ``weighted(labels, weights)`` for class weights (`WeighsClasses`),
    ``losses(model, batch)`` for sample-level privacy (`RowLosses`), ``lacks(metric, labels)`` for metrics
    that some data do not have (`LacksMetrics`), and ``pads_left = True`` if its batches are padded on the
    left, for ``machine.batch_clients``. With that key, ``loss`` must call the model once, and read nothing of
    it but the logits that it returns.
    """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The batch's mean loss over its samples."""
        ...

    def parts(self, batch: Batch, count: int | TokenBudget) -> Sequence[tuple[Batch, float]]:
        """The batch in at most ``count`` parts, or in parts within a budget, each with its share of the mean.

        The sum of ``share · loss(part)`` is ``loss(batch)``. Only ``training.accumulation`` (a number) and
        ``training.tokens_per_batch`` (a budget) need it; `fedsmoothlora.data.tokens.cut` takes both.
        """
        ...

    def evaluate(
        self, model: nn.Module, examples: Examples, batch_size: int, to_device: Callable[[Batch], Batch]
    ) -> Evaluation:
        """Metrics over all examples."""
        ...


@runtime_checkable
class LacksMetrics(Protocol):
    """An objective some of whose metrics are not defined for all data."""

    def lacks(self, metric: str, labels: Callable[[], Tensor | None]) -> bool:
        """Whether it is known that an evaluation of these rows does not have a metric.

        Args:
            metric: the metric's name.
            labels: returns the label of every row; None if that is not known.
        """
        ...


@runtime_checkable
class RowLosses(Protocol):
    """An objective that knows the loss of every single row, as ``privacy.unit = "sample"`` needs."""

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of every row as if it were alone in the batch, ``(rows,)``."""
        ...
