"""FLoRIST: the mean of the products is merged without its small singular values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Interval

from fedsmoothlora.algebra.update import Update
from fedsmoothlora.methods.base import ClientView, Family, Method, ServerUpdate, ServerView, Start, Traits

if TYPE_CHECKING:
    from fedsmoothlora.algebra.lowrank import LowRank


@dataclass(frozen=True, kw_only=True)
class FLoRIST(Method):
    """FLoRIST (arXiv 2506.09199): the leading part of the mean of products is merged, by a share of energy.

    From the paper: the server stacks the clients' factors as FLoRA does, takes the SVD of the stacked product
    from thin factors, and keeps the smallest number ``k`` of directions whose squared singular values hold a
    share ``tau`` of all. Clients may have LoRA of different ranks.

    Decided here: the ``k`` directions of a layer are merged into the backbone and every round starts afresh,
    as in FLoRA, so that ranks of clients do not have to fit the server's ``k``. The tail is dropped.

    Attributes:
        energy: ``tau``, the share of the squared singular values that a layer's update keeps; with 1, all
            directions are kept, and the method is FLoRA.
    """

    energy: Annotated[float, Interval(gt=0, le=1)] = 0.95

    name: ClassVar[str] = "florist"
    family: ClassVar[Family] = "merged"
    traits: ClassVar[Traits] = Traits(
        client_ranks=True,
        uses_mean_only=True,
        asynchronous=True,
        no_sum_reason="it averages products, whose factors cannot be added up",
    )
    numbers_down: ClassVar[str] = "min(k*(m + n), m*n)"
    limitation: ClassVar[str] = "drops the tail of every mean; no LoRA is kept from round to round"

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
        """``SVD_k(sum_c p_c B_c A_c)`` is merged."""
        from fedsmoothlora.algebra.averaging import mean_product

        means = {name: mean_product(uploads, weights, name) for name in server.layers}
        return ServerUpdate(merge={name: leading_share(mean, self.energy) for name, mean in means.items()})


def leading_share(singular: LowRank, share: float) -> LowRank:
    """The fewest leading directions that hold a share of the sum of squared singular values.

    Args:
        singular: balanced singular factors, in the order of singular values.
        share: the share, above 0 and at most 1; 1 keeps all directions.
    """
    import torch

    from fedsmoothlora.algebra.lowrank import LowRank
    from fedsmoothlora.algebra.ranks import rank_for_share

    if share == 1 or singular.rank == 0:
        return singular
    energies = torch.linalg.vector_norm(singular.B.double(), dim=0) ** 4  # columns have sqrt(sigma)
    k = rank_for_share(energies, share)
    return LowRank(singular.B[:, :k].contiguous(), singular.A[:k].contiguous())
