"""FlexLoRA: the truncated mean becomes the next LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Ge

from fedsmoothlora.algebra.update import Layer, Update
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.methods.base import (
    ClientView,
    Family,
    Method,
    ServerUpdate,
    ServerView,
    Start,
    Traits,
    energy_share,
)

if TYPE_CHECKING:
    from fedsmoothlora.algebra.coding import Packed


@dataclass(frozen=True, kw_only=True)
class FlexLoRA(Method):
    """FlexLoRA (arXiv 2402.11505): every client continues from the mean product, truncated to its own rank.

    Client ``c`` continues from ``SVD_{r_c}(DW)`` with ``DW = sum_c p_c B_c A_c``; nothing is merged. With
    server feedback, clients continue from ``SVD(DW + E)``, and the truncation error becomes the next ``E``
    (error feedback, arXiv 1901.09847).

    Attributes:
        server_rank: ``energy:SHARE``, such as ``energy:0.95``, keeps of each layer's mean the smallest rank,
            from 1 to ``r``, at which the squared singular values hold that share of all (beyond the paper).
            Clients fill their LoRA up to its rank with new directions. ``r`` unless set.
        server_feedback: add the truncation error of each round to the next round's mean.
        feedback_rank: rank to which that error is truncated; not truncated unless set.
    """

    server_rank: str | None = None
    server_feedback: bool = False
    feedback_rank: Annotated[int, Ge(1)] | None = None

    name: ClassVar[str] = "flexlora"
    family: ClassVar[Family] = "merged"
    traits: ClassVar[Traits] = Traits(
        client_ranks=True,
        step_on="product",
        uses_mean_only=True,
        asynchronous=True,
        no_sum_reason="it averages products, whose factors cannot be added up",
    )
    numbers_down: ClassVar[str] = "r*(m + n)"
    limitation: ClassVar[str] = "keeps `r` directions of the mean, unless `server_feedback`"

    @property
    def feeds_back(self) -> bool:
        """Whether ``server_feedback`` is on."""
        return self.server_feedback

    @property
    def widest(self) -> FlexLoRA:
        """The method with every rank at its highest."""
        return replace(self, server_rank=None)

    def check(self, layers: Mapping[str, Layer], *, partial: bool) -> None:
        """Refuse ``feedback_rank`` without ``server_feedback``, and a ``server_rank`` that is no share."""
        if self.server_rank is not None:
            energy_share(self.server_rank)
        if self.feedback_rank is not None and not self.server_feedback:
            raise ConfigError(
                f"method.feedback_rank = {self.feedback_rank} belongs to method.server_feedback = true"
            )

    def start(self, client: ClientView) -> Start:
        """The server's LoRA at the client's own rank; in the first round PEFT's initialisation."""
        from fedsmoothlora.algebra.alignment import trainable
        from fedsmoothlora.algebra.averaging import products
        from fedsmoothlora.algebra.lowrank import LowRank

        sent = products(client.server_lora)
        lora = {}
        for name, layer in client.layers.items():
            # Singular factors are in the order of singular values, so the first r_c columns are SVD_{r_c}.
            product = sent.get(name, client.initial(name))
            own = LowRank(product.B[:, : layer.rank], product.A[: layer.rank])
            lora[name] = trainable(own, layer.rank, client.generator(name))
        return Start(lora=lora)

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """``SVD_r(DW + E)``; without feedback ``E = 0``."""
        from fedsmoothlora.algebra.alignment import squared_norm
        from fedsmoothlora.algebra.averaging import exact_mean, products_of
        from fedsmoothlora.algebra.coding import unpacked
        from fedsmoothlora.algebra.lowrank import LowRank
        from fedsmoothlora.algebra.ranks import leading_singular_values, rank_for_share

        model: dict[str, LowRank] = {}
        memory: dict[str, LowRank] = {}
        lora: dict[str, LowRank | Packed] = {}
        for name, layer in server.layers.items():
            mean = exact_mean(products_of(uploads, name), weights)
            left = server.memory.get(name)
            if isinstance(left, LowRank):
                mean = mean + left
            rank = layer.rank
            if self.server_rank is not None:
                energies = leading_singular_values(mean, rank).square()
                share = energy_share(self.server_rank)
                rank = max(1, rank_for_share(energies, share, squared_norm(mean)))
            model[name] = mean.truncate(rank)
            if self.server_feedback:  # it takes up what coding loses too
                coded = server.code(mean, model[name])
                model[name] = LowRank.of(unpacked(coded))
                memory[name] = (mean - model[name]).truncate(self.feedback_rank, tolerance=1e-6)
                if server.packs:
                    lora[name] = coded
        return ServerUpdate(model=model, lora=lora or None, memory=memory)
