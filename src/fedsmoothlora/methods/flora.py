"""FLoRA: the exact mean of the products is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedsmoothlora.algebra.update import Update
from fedsmoothlora.methods.base import ClientView, Family, Method, ServerUpdate, ServerView, Start, Traits


@dataclass(frozen=True, kw_only=True)
class FLoRA(Method):
    """FLoRA (arXiv 2409.05976): the exact mean of the products is merged, with a new random start each round.

    The paper stacks the clients' factors: ``[B_1 ... B_C] [p_1 A_1; ...; p_C A_C] = sum_c p_c B_c A_c``, of
    rank ``sum_c r_c``. Here clients receive the same product as singular factors, because stacked factors
    would show every client the uploads of all others.
    """

    name: ClassVar[str] = "flora"
    family: ClassVar[Family] = "merged"
    traits: ClassVar[Traits] = Traits(
        client_ranks=True,
        uses_mean_only=True,
        asynchronous=True,
        no_sum_reason="it averages products, whose factors cannot be added up",
    )
    numbers_down: ClassVar[str] = "min(C*r*(m + n), m*n)"
    limitation: ClassVar[str] = (
        "messages down grow with the number of clients; no LoRA is kept from round to round"
    )

    def start(self, client: ClientView) -> Start:
        """``B = 0`` and random rows in ``A``, drawn anew for every round and client."""
        from fedsmoothlora.algebra.alignment import trainable
        from fedsmoothlora.algebra.lowrank import LowRank

        return Start(
            lora={
                name: trainable(LowRank.zeros(layer.m, layer.n), layer.rank, client.generator(name))
                for name, layer in client.layers.items()
            }
        )

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """``sum_c p_c B_c A_c`` is merged exactly."""
        from fedsmoothlora.algebra.averaging import mean_product

        return ServerUpdate(merge={name: mean_product(uploads, weights, name) for name in server.layers})
