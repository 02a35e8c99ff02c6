"""The record of a round: its metrics, by name and client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# Prefixes of metrics of clients' own models: on the global test set, and on their validation rows.
ON_TEST = "on_test_"
OWN = "own_"
# Of personal models beside the global one, and of the fine-tuned final model, on clients' validation rows.
PERSONAL = "personal_"
TUNED = "tuned_"
PREFIXES = (ON_TEST, OWN, PERSONAL, TUNED)

# Ends of metrics over clients: mean, mean over the worst tenth, and standard deviation.
MEAN_OVER_CLIENTS = "_mean_over_clients"
WORST_TENTH = "_worst_tenth"
STD_OVER_CLIENTS = "_std_over_clients"


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
