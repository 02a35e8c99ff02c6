"""LoRA-FAIR: FedIT with a correction of the mean ``B``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from annotated_types import Gt

from fedsmoothlora.algebra.update import Update
from fedsmoothlora.methods.base import Family, Method, ServerUpdate, ServerView, Traits

if TYPE_CHECKING:
    from torch import Tensor

    from fedsmoothlora.algebra.lowrank import LowRank


@dataclass(frozen=True, kw_only=True)
class LoRAFair(Method):
    """LoRA-FAIR (arXiv 2411.14961): FedIT, with a correction of ``B`` towards the mean of products.

    From the paper: the factors are averaged separately, ``B = sum_c p_c B_c`` and ``A = sum_c p_c A_c``. The
    server corrects ``B`` so that ``(B + dB) A`` is close to ``DW = sum_c p_c B_c A_c`` and ``dB`` is small,
    and all clients continue from ``(B + dB, A)``.

    Decided here: closeness is the Frobenius distance, in place of the paper's similarity measure, so that the
    correction is the ridge solution in closed form, ``dB = (DW - B A) A^T (A A^T + lambda I)^-1``. With
    ``lambda -> 0``, ``(B + dB) A`` is the projection of ``DW`` onto the rows of ``A``.

    Attributes:
        regularization: ``lambda``, the weight of ``||dB||^2``; the larger, the closer to FedIT.
    """

    regularization: Annotated[float, Gt(0)] = 0.01

    name: ClassVar[str] = "lora_fair"
    family: ClassVar[Family] = "factor-averaging"
    traits: ClassVar[Traits] = Traits(
        averages_factors=True,
        no_sum_reason="it needs every client's product, and a sum of masked factors keeps none",
        no_privacy_reason="its correction needs every client's product, not only the mean of the factors",
        step_on=None,
        no_step_reason="it fits B to the mean A, and a step of an optimiser would change A after the fit",
        no_coordinates_reason=(
            "it needs every client's product, which a median or trimmed mean of factors does not keep"
        ),
        stable_parameters=True,
        asynchronous=True,
    )
    numbers_down: ClassVar[str] = "r*(m + n)"
    limitation: ClassVar[str] = (
        "inexact: of the mean product, it keeps only the part in the row space of the mean `A`"
    )

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """The mean factors with the corrected ``B`` become the next LoRA of every client."""
        from fedsmoothlora.algebra.averaging import mean_factors, products_of
        from fedsmoothlora.algebra.lowrank import LowRank

        model = {}
        for name, mean in mean_factors(uploads, weights, server.layers).items():
            dB = correction(products_of(uploads, name), weights, mean, self.regularization)
            model[name] = LowRank(mean.B + dB, mean.A)
        return ServerUpdate(model=model)


def correction(
    products: Sequence[LowRank], weights: Sequence[float], mean: LowRank, regularization: float
) -> Tensor:
    """``dB = (sum_c p_c B_c A_c - B A) A^T (A A^T + lambda I)^-1``, ``(m, r)``, without a dense matrix.

    Computed in float64, because ``A A^T`` may be close to singular.

    Args:
        products: the clients' ``B_c A_c``.
        weights: numbers to which ``p_c`` is proportional.
        mean: the mean factors ``B``, ``A``.
        regularization: ``lambda``.
    """
    import torch

    from fedsmoothlora.algebra.averaging import client_weights

    B, A = mean.B.double(), mean.A.double()
    gram = A @ A.mT  # (r, r)
    right = -B @ gram  # (m, r)
    for product, p in zip(products, client_weights(weights), strict=True):
        right += p * (product.B.double() @ (product.A.double() @ A.mT))
    ridge = gram + regularization * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(ridge, right, left=False).to(mean.dtype)
