"""The interface of a costly metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from fedsmoothlora.data.examples import Batch


class Measurement(Protocol):
    """A metric of the global model that is too costly for every row and every round."""

    def due(self, round: int, rounds: int) -> bool:
        """Whether to measure it when ``round`` of ``rounds`` rounds are finished."""
        ...

    def take(self, model: nn.Module, to_device: Callable[[Batch], Batch]) -> dict[str, float]:
        """The metrics by name."""
        ...


@dataclass(frozen=True)
class Times:
    """The rounds in which a costly metric is measured: before the first round, after the last, and between.

    Attributes:
        every: number of rounds from one measurement to the next; 0 for none between the first and the last.
    """

    every: int = 0

    def due(self, round: int, rounds: int) -> bool:
        """Whether to measure it when ``round`` of ``rounds`` rounds are finished."""
        return round in (0, rounds) or (self.every > 0 and round % self.every == 0)
