"""FRLoRA: every round restarts from the leading part of the pretrained weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsmoothlora.algebra.update import Layer, Products, Update
from fedsmoothlora.methods.base import ClientView, Method, ServerUpdate, ServerView, Start, Traits

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FRLoRA(Method):
    """FRLoRA (ICLR 2025): rounds restart from the leading part of the pretrained weights, changes are merged.

    ``B_0, A_0`` are the top-r singular directions of ``W^0`` (``sqrt(sigma/s)`` on both), ``W -= s B_0 A_0``
    once; each round ``W += s (B A - B_0 A_0)``, ``B = sum_c p_c B_c``, ``A = sum_c p_c A_c``. Here the
    backbone keeps ``B_0 A_0`` and a client's start is shifted by ``-B_0 A_0``, which is the same weight at
    every moment.
    """

    name: ClassVar[str] = "frlora"
    traits: ClassVar[Traits] = Traits(
        averages_factors=True,
        float32_reason="what it merges is a small change of the pretrained weights' leading part, and "
        "rounding would drown it",
    )
    numbers_down: ClassVar[str] = "min(2*r*(m + n), m*n)"
    cannot: ClassVar[str] = "be exact: the mean of factors is not the mean of products"

    def prepare(self, layers: Mapping[str, Layer], pretrained: Callable[[str], Tensor]) -> Products:
        """``B_0 A_0 = SVD_r(W^0) / s`` of every layer."""
        from fedsmoothlora.algebra.lowrank import LowRank
        from fedsmoothlora.algebra.spectral import leading_singular_triplets

        leading = {}
        for name, layer in layers.items():
            P, sigma, Q = leading_singular_triplets(pretrained(name), layer.rank)
            root = (sigma / layer.scale).sqrt()
            # Stored row by row: with another memory layout, sums of products differ in their last bits.
            leading[name] = LowRank((P * root).contiguous(), (root[:, None] * Q.mT).contiguous())
        return leading

    def start(self, client: ClientView) -> Start:
        """``(B_0, A_0)``, with the backbone shifted by ``-B_0 A_0``."""
        lora = {name: client.prepared[name] for name in client.layers}
        return Start(lora=lora, shift={name: -product for name, product in lora.items()})

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """``B A - B_0 A_0`` of the mean factors, merged."""
        from fedsmoothlora.algebra.averaging import mean_factors

        means = mean_factors(uploads, weights, server.layers)
        return ServerUpdate(merge={name: mean - server.prepared[name] for name, mean in means.items()})
