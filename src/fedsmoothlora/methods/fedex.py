"""FedEx-LoRA: FedIT with an exact global model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedsmoothlora.algebra.update import Update
from fedsmoothlora.methods.base import Method, ServerUpdate, ServerView, Traits


@dataclass(frozen=True, kw_only=True)
class FedEx(Method):
    """FedEx-LoRA (arXiv 2410.09432): FedIT, with what averaging the factors misses merged into the backbone.

    ``W += s (sum_c p_c B_c A_c - B A)``, ``B = sum_c p_c B_c``, ``A = sum_c p_c A_c``: the global model is
    exact.
    """

    name: ClassVar[str] = "fedex"
    traits: ClassVar[Traits] = Traits(
        averages_factors=True,
        step_on=None,
        no_step_reason=(
            "what it merges is what averaging the factors missed, and would not be with another step"
        ),
        no_coordinates_reason=(
            "it needs every client's product, of which a median or trimmed mean of factors leaves none"
        ),
        float32_reason="what it merges is a small difference of larger products, which rounding would drown",
    )
    numbers_down: ClassVar[str] = "r*(m + n) + min((C + 1)*r*(m + n), m*n)"
    cannot: ClassVar[str] = "keep messages down small with many clients"

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """Mean factors as the next LoRA; the residual ``sum_c p_c B_c A_c - B A`` merged."""
        from fedsmoothlora.algebra.averaging import mean_factors, mean_product

        model = mean_factors(uploads, weights, server.layers)
        residual = {name: mean_product(uploads, weights, name) - lora for name, lora in model.items()}
        return ServerUpdate(model=model, merge=residual)
