"""FedMomentum: the leading part of the mean becomes the next LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedsmoothlora.algebra.update import Update
from fedsmoothlora.methods.base import ClientView, Family, Method, ServerUpdate, ServerView, Start, Traits


@dataclass(frozen=True, kw_only=True)
class FedMomentum(Method):
    """FedMomentum (arXiv 2603.08014, from its abstract): the mean's leading part is LoRA, the rest is merged.

    With ``DW = sum_c p_c B_c A_c``, ``SVD_r(DW)`` is the next LoRA of all clients, and
    ``W += s (DW - SVD_r(DW))``.
    """

    name: ClassVar[str] = "fedmomentum"
    family: ClassVar[Family] = "exact"
    traits: ClassVar[Traits] = Traits(
        step_on=None,
        uses_mean_only=True,
        asynchronous=True,
        no_sum_reason="it averages products, whose factors cannot be added up",
        no_step_reason=(
            "it splits one mean into the next LoRA and the merged update, and has its own momentum"
        ),
    )
    numbers_down: ClassVar[str] = "r*(m + n) + min((C - 1)*r*(m + n), m*n)"
    limitation: ClassVar[str] = "messages down grow with the number of clients"

    def start(self, client: ClientView) -> Start:
        """The server's LoRA, with missing directions filled up; in round 0 PEFT's initialisation."""
        from fedsmoothlora.algebra.alignment import trainable

        lora = super().start(client).lora
        return Start(
            lora={
                name: trainable(lora[name], layer.rank, client.generator(name))
                for name, layer in client.layers.items()
            }
        )

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """``SVD_r(DW)`` becomes the next LoRA, the rest of ``DW`` is merged; their sum is exactly ``DW``."""
        from fedsmoothlora.algebra.averaging import exact_mean, products_of
        from fedsmoothlora.algebra.lowrank import LowRank

        model, merge = {}, {}
        for name, layer in server.layers.items():
            uploaded = products_of(uploads, name)
            most = sum(product.rank for product in uploaded)
            mean = exact_mean(uploaded, weights).truncate(most)  # in the order of singular values
            r = layer.rank
            model[name] = LowRank(mean.B[:, :r], mean.A[:r])
            merge[name] = LowRank(mean.B[:, r:], mean.A[r:])
        return ServerUpdate(model=model, merge=merge)
