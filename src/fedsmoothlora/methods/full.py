"""Full fine-tuning: federated averaging of full weight matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedsmoothlora.algebra.update import Sent, Update
from fedsmoothlora.methods.base import ClientView, Family, Method, ServerUpdate, ServerView, Start, Traits


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(Method):
    """Full fine-tuning of the targeted weights (FedAvg, arXiv 1602.05629): an upper bound for comparisons.

    There is no LoRA: clients train ``W`` of the targeted layers, and the server merges the mean change.
    """

    name: ClassVar[str] = "full"
    family: ClassVar[Family] = "exact"
    traits: ClassVar[Traits] = Traits(
        averages_factors=True,
        stable_parameters=True,
        uses_mean_only=True,
        sums_tensors=True,
        asynchronous=True,
        float32_reason="it sends dense weights, and only factors can be sent in fewer bits",
    )
    numbers_down: ClassVar[str] = "m*n"
    limitation: ClassVar[str] = "large messages"

    def sends(self, round: int) -> Sent:
        """The change of the weight, divided by ``s``."""
        return "W"

    def start(self, client: ClientView) -> Start:
        """The global weights."""
        return Start(lora={}, trains=("W",))

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """The mean change is merged."""
        from fedsmoothlora.algebra.averaging import mean_part

        return ServerUpdate(merge={name: mean_part(uploads, weights, name) for name in server.layers})
