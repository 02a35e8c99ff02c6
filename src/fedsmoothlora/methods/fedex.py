"""FedEx-LoRA: FedIT with an exact global model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedsmoothlora.algebra.update import Update
from fedsmoothlora.methods.base import Family, Method, ServerUpdate, ServerView, Traits


@dataclass(frozen=True, kw_only=True)
class FedEx(Method):
    """FedEx-LoRA (arXiv 2410.09432): FedIT, with the error of averaging factors merged into the backbone.

    ``W += s (sum_c p_c B_c A_c - B A)`` with ``B = sum_c p_c B_c`` and ``A = sum_c p_c A_c``, so the global
    model is the exact mean.
    """

    name: ClassVar[str] = "fedex"
    family: ClassVar[Family] = "exact"
    traits: ClassVar[Traits] = Traits(
        averages_factors=True,
        step_on=None,
        no_async_reason=(
            "its residual is exact only for factors that were trained from the LoRA of this round"
        ),
        no_step_reason=(
            "it merges the error of averaging the factors, and a step of an optimiser would change that error"
        ),
        no_coordinates_reason=(
            "it needs every client's product, which a median or trimmed mean of factors does not keep"
        ),
        no_sum_reason="it needs every client's product, and a sum of masked factors keeps none",
        no_privacy_reason=(
            "it needs the mean of the products beside the mean of the factors, which would be two noised "
            "releases"
        ),
        float32_reason="it merges a small difference of large products, which rounding would hide",
    )
    numbers_down: ClassVar[str] = "r*(m + n) + min((C + 1)*r*(m + n), m*n)"
    limitation: ClassVar[str] = "messages down grow with the number of clients"

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """The mean factors become the next LoRA; the residual ``sum_c p_c B_c A_c - B A`` is merged."""
        from fedsmoothlora.algebra.averaging import mean_factors, mean_product

        model = mean_factors(uploads, weights, server.layers)
        residual = {name: mean_product(uploads, weights, name) - lora for name, lora in model.items()}
        return ServerUpdate(model=model, merge=residual)
