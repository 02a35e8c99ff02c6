"""The interface of an objective: a loss, its parts, and an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from fedsmoothlora.data.examples import Batch, Examples


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        metrics: metrics by name; always ``loss``, and the objective's own.
        confusion: rows by true and predicted class, ``(classes, classes)``, where there are classes.
        weight: what the metrics are means over (tokens, for a language model); rows unless given.
    """

    metrics: dict[str, float]
    confusion: Tensor | None = None
    weight: float | None = None


class Objective(Protocol):
    """The loss that a model is trained on, and its evaluation."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The batch's mean loss over its samples."""
        ...

    def parts(self, batch: Batch, count: int) -> Sequence[tuple[Batch, float]]:
        """The batch in at most ``count`` parts, each with its share of the mean.

        The sum of ``share · loss(part)`` is ``loss(batch)``. Asked only where gradients are accumulated.
        """
        ...

    def evaluate(
        self, model: nn.Module, examples: Examples, batch_size: int, to_device: Callable[[Batch], Batch]
    ) -> Evaluation:
        """Metrics over all examples."""
        ...
