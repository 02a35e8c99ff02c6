"""The record of a round: its metrics, by name and client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# Prefixes of metrics of clients' own models: on the global test set, and on their validation rows.
ON_TEST = "on_test_"
OWN = "own_"


@dataclass(frozen=True)
class Metric:
    """One number, of a client or, if ``client`` is None, of the global model or the server."""

    client: str | None
    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """The result of a round. ``round`` counts finished rounds: 0 is the evaluation before training.

    ``confusion`` is the global model's confusion matrix, rows by true and predicted class, if there are
    classes.
    """

    round: int
    metrics: Sequence[Metric]
    confusion: Tensor | None = None

    def value(self, name: str) -> float | None:
        """A metric of the global model or the server, by name."""
        return next((f.value for f in self.metrics if f.client is None and f.name == name), None)
