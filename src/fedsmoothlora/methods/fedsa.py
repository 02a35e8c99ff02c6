"""FedSA-LoRA: only ``A`` is shared."""

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
class FedSA(Method):
    """FedSA-LoRA (arXiv 2410.01463): ``A`` is shared and averaged, every client keeps its own ``B``.

    There is no global model: global metrics are means of the clients' models.
    """

    name: ClassVar[str] = "fedsa"
    family: ClassVar[Family] = "personal"
    traits: ClassVar[Traits] = Traits(
        averages_factors=True,
        global_model=False,
        step_on="factors",
        asynchronous=True,
        sums_tensors=True,
        no_privacy_reason="it has no global model, so its metrics would be those of the clients' own models",
    )
    numbers_down: ClassVar[str] = "r*n"
    limitation: ClassVar[str] = "no global model: every client has its own `B`"

    def sends(self, round: int) -> Sent:
        """Only ``A``."""
        return "A"

    def start(self, client: ClientView) -> Start:
        """The server's ``A`` and the client's own last ``B``, which is 0 at first."""
        from fedsmoothlora.algebra.lowrank import LowRank

        lora = {}
        for name in client.layers:
            initial, A, B = client.initial(name), client.server_lora.get(name), client.kept.get(name)
            lora[name] = LowRank(
                B if B is not None and not isinstance(B, LowRank) else initial.B,
                A if A is not None and not isinstance(A, LowRank) else initial.A,
            )
        return Start(lora=lora)

    def upload(self, trained: Update, start: Start, client: ClientView) -> Upload:
        """The trained ``A``; ``B`` stays at the client."""
        from fedsmoothlora.algebra.averaging import products

        factors = products(trained)
        return Upload(
            sent={name: product.A for name, product in factors.items()},
            kept={name: product.B for name, product in factors.items()},
        )

    def unchanged(self, server: ServerView) -> Update:
        """The shared ``A``."""
        return {name: server.lora.get(name, server.initial(name).A) for name in server.layers}

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """``A = sum_c p_c A_c``."""
        from fedsmoothlora.algebra.averaging import mean_part

        return ServerUpdate(lora={name: mean_part(uploads, weights, name) for name in server.layers})
