"""HetLoRA: factors of different ranks are padded with zeros and averaged by their norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsmoothlora.algebra.update import Update
from fedsmoothlora.methods.base import ClientView, Family, Method, ServerUpdate, ServerView, Start, Traits

if TYPE_CHECKING:
    from fedsmoothlora.algebra.lowrank import LowRank


@dataclass(frozen=True, kw_only=True)
class HetLoRA(Method):
    """HetLoRA (arXiv 2401.06432): factors of different ranks, zero-padded and averaged by their norms.

    From the paper: a client of rank ``r_c`` trains the first ``r_c`` columns of ``B`` and rows of ``A``. The
    server pads uploads with zeros to its own rank and averages the factors separately, with weights
    proportional to the Frobenius norm of the client's product, ``w_c ~ ||B_c A_c||``.

    Decided here: a client has one weight for all layers, from the norm over all of them, and numbers of
    samples are not used (they are if all norms are 0). Directions that no client of a round has stay as they
    were, so that a round without clients of high rank does not set both of their factors to 0, from where
    they could not train again. The paper's self-pruning of ranks is left out.
    """

    name: ClassVar[str] = "hetlora"
    family: ClassVar[Family] = "factor-averaging"
    traits: ClassVar[Traits] = Traits(
        client_ranks=True,
        no_privacy_reason="it weighs clients by the norms of their products, which depend on their data",
        no_sum_reason="it weighs clients by the norms of their products, which are hidden under a mask",
        step_on="factors",
        no_async_reason=(
            "it weighs clients by the norms of their products, and of an older upload only the change counts"
        ),
        no_robust_reason="it weighs clients by the norms of their products",
        packed_reason=(
            "it averages the factors themselves, and a product in few bits is sent as other factors of "
            "the same product"
        ),
    )
    numbers_down: ClassVar[str] = "r*(m + n)"
    limitation: ClassVar[str] = "inexact: the product of mean factors is not the mean of products"

    def start(self, client: ClientView) -> Start:
        """The first ``r_c`` directions of the server's LoRA."""
        from fedsmoothlora.algebra.averaging import products
        from fedsmoothlora.algebra.lowrank import LowRank

        sent = products(client.server_lora)
        lora = {}
        for name, layer in client.layers.items():
            product = sent.get(name, client.initial(name))
            lora[name] = LowRank(product.B[:, : layer.rank], product.A[: layer.rank])
        return Start(lora=lora)

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """``B = sum_c w_c [B_c 0]`` and ``A = sum_c w_c [A_c; 0]``."""
        from fedsmoothlora.algebra.averaging import mean_factors, products_of

        own = norm_weights(uploads, weights, list(server.layers))
        model = {}
        for name in server.layers:
            before = server.model.get(name, server.initial(name))
            found = products_of(uploads, name)
            most = max(product.rank for product in found)
            alike = [{name: padded(product, most)} for product in found]
            model[name] = extended(mean_factors(alike, own, [name])[name], before)
        return ServerUpdate(model=model)


def norm_weights(uploads: Sequence[Update], counts: Sequence[float], layers: Sequence[str]) -> list[float]:
    """``w_c = sqrt(sum_layers ||B_c A_c||_F^2)``; the numbers of samples if all of them are 0."""
    from fedsmoothlora.algebra.averaging import products_of

    squares = [0.0] * len(uploads)
    for name in layers:
        for c, product in enumerate(products_of(uploads, name)):
            squares[c] += product.norm() ** 2
    return [math.sqrt(square) for square in squares] if any(squares) else list(counts)


def padded(product: LowRank, rank: int) -> LowRank:
    """The factors with columns and rows of zeros added up to ``rank``."""
    from torch.nn.functional import pad

    from fedsmoothlora.algebra.lowrank import LowRank

    missing = rank - product.rank
    return LowRank(pad(product.B, (0, missing)), pad(product.A, (0, 0, 0, missing)))


def extended(product: LowRank, before: LowRank) -> LowRank:
    """The factors followed by the directions of ``before`` that they do not have."""
    import torch

    from fedsmoothlora.algebra.lowrank import LowRank

    r = product.rank
    return LowRank(
        torch.cat([product.B, before.B[:, r:].to(product.B)], dim=1),
        torch.cat([product.A, before.A[r:].to(product.A)]),
    )
