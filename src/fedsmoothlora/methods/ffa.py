"""FFA-LoRA: only ``B`` is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedsmoothlora.algebra.update import Sent, Update
from fedsmoothlora.methods.base import (
    ClientView,
    Family,
    Method,
    ServerUpdate,
    ServerView,
    Start,
    Traits,
    Upload,
)


@dataclass(frozen=True, kw_only=True)
class FFA(Method):
    """FFA-LoRA (arXiv 2403.12313): ``A`` frozen at a shared random start, ``B`` trained and averaged exactly.

    With the same ``A`` for all clients, ``sum_c p_c B_c A = (sum_c p_c B_c) A``: the product of the mean
    ``B`` is the mean of products.
    """

    name: ClassVar[str] = "ffa"
    family: ClassVar[Family] = "exact"
    traits: ClassVar[Traits] = Traits(
        averages_factors=True,
        step_on="factors",
        stable_parameters=True,
        uses_mean_only=True,
        sums_tensors=True,
        asynchronous=True,
    )
    numbers_down: ClassVar[str] = "r*m"
    limitation: ClassVar[str] = "all updates are in the row space of its random `A`"

    def sends(self, round: int) -> Sent:
        """Only ``B``."""
        return "B"

    def start(self, client: ClientView) -> Start:
        """The server's ``B``, which is 0 at first, and the shared ``A``, which is not trained."""
        from fedsmoothlora.algebra.lowrank import LowRank

        lora = {}
        for name in client.layers:
            initial, sent = client.initial(name), client.server_lora.get(name)
            B = initial.B if sent is None else sent.B if isinstance(sent, LowRank) else sent
            lora[name] = LowRank(B, initial.A)
        return Start(lora=lora, trains=("B",))

    def upload(self, trained: Update, start: Start, client: ClientView) -> Upload:
        """The trained ``B``."""
        from fedsmoothlora.algebra.averaging import products

        return Upload(sent={name: product.B for name, product in products(trained).items()})

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """``B = sum_c p_c B_c``; ``A`` is not sent, since every client draws it from the run's seed."""
        from fedsmoothlora.algebra.averaging import mean_part
        from fedsmoothlora.algebra.lowrank import LowRank

        B = {name: mean_part(uploads, weights, name) for name in server.layers}
        return ServerUpdate(model={n: LowRank(B[n], server.initial(n).A) for n in server.layers}, lora=B)
