"""FRLoRA: every round restarts from the leading part of the pretrained weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsmoothlora.algebra.update import Layer, Products, Update
from fedsmoothlora.methods.base import ClientView, Family, Method, ServerUpdate, ServerView, Start, Traits

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FRLoRA(Method):
    """FRLoRA (ICLR 2025): rounds restart from the leading part of the pretrained weights, changes are merged.

    ``B_0, A_0`` are the top-r singular directions of ``W^0``, each with ``sqrt(sigma/s)``. The paper
    subtracts ``s B_0 A_0`` from ``W`` once. Each round, ``W += s (B A - B_0 A_0)`` with ``B = sum_c p_c B_c``
    and ``A = sum_c p_c A_c``. In this implementation the backbone keeps ``B_0 A_0``, and a client's start is
    shifted by ``-B_0 A_0``, which gives the same weights.
    """

    name: ClassVar[str] = "frlora"
    family: ClassVar[Family] = "merged"
    traits: ClassVar[Traits] = Traits(
        averages_factors=True,
        uses_mean_only=True,
        sums_tensors=True,
        asynchronous=True,
        float32_reason="it merges a small change of the leading part of the pretrained weights, which "
        "rounding would hide",
    )
    numbers_down: ClassVar[str] = "min(2*r*(m + n), m*n)"
    limitation: ClassVar[str] = "inexact: the product of mean factors is not the mean of products"

    def prepare(self, layers: Mapping[str, Layer], pretrained: Callable[[str], Tensor]) -> Products:
        """``B_0 A_0 = SVD_r(W^0) / s`` of every layer."""
        from fedsmoothlora.algebra.lowrank import LowRank
        from fedsmoothlora.algebra.spectral import leading_singular_triplets

        leading = {}
        for name, layer in layers.items():
            P, sigma, Q = leading_singular_triplets(pretrained(name), layer.rank)
            root = (sigma / layer.scale).sqrt()
            # Stored row by row, because sums of products in another memory layout differ in their last bits.
            leading[name] = LowRank((P * root).contiguous(), (root[:, None] * Q.mT).contiguous())
        return leading

    def start(self, client: ClientView) -> Start:
        """``(B_0, A_0)``, with the backbone shifted by ``-B_0 A_0``."""
        lora = {name: client.prepared[name] for name in client.layers}
        return Start(lora=lora, shift={name: -product for name, product in lora.items()})

    def unchanged(self, server: ServerView) -> Update:
        """``(B_0, A_0)``, from which every round restarts."""
        return server.prepared

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """``B A - B_0 A_0`` is merged, with the mean factors ``B`` and ``A``."""
        from fedsmoothlora.algebra.averaging import mean_factors

        means = mean_factors(uploads, weights, server.layers)
        return ServerUpdate(merge={name: mean - server.prepared[name] for name, mean in means.items()})
