"""What a task is to the rest: a loss, its parts, and an evaluation; and what a costly measurement is."""

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
        figures: metrics by name; always ``loss``, and the task's own.
        confusion: rows by true and predicted class, ``(classes, classes)``, where there are classes.
        weight: what the figures are means over (tokens, for a language model); rows unless given.
    """

    figures: dict[str, float]
    confusion: Tensor | None = None
    weight: float | None = None


class Task(Protocol):
    """A loss to train on and an evaluation."""

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


class Measurement(Protocol):
    """A figure of the global model that is too costly for every row and every round."""

    def due(self, round: int, rounds: int) -> bool:
        """Whether to take it when ``round`` of ``rounds`` rounds are finished."""
        ...

    def take(self, model: nn.Module, to_device: Callable[[Batch], Batch]) -> dict[str, float]:
        """The figures by name."""
        ...


@dataclass(frozen=True)
class Times:
    """When a costly measurement is taken.

    Attributes:
        every: after so many rounds each; 0 for only before the first round and after the last.
    """

    every: int = 0

    def due(self, round: int, rounds: int) -> bool:
        """Whether to take it when ``round`` of ``rounds`` rounds are finished."""
        return round in (0, rounds) or (self.every > 0 and round % self.every == 0)
