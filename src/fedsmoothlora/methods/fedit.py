"""FedIT: separate means of the factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedsmoothlora.algebra.update import Update
from fedsmoothlora.methods.base import Family, Method, ServerUpdate, ServerView, Traits


@dataclass(frozen=True, kw_only=True)
class FedIT(Method):
    """FedIT (FedAvg + LoRA, arXiv 2305.05644): factors averaged separately and kept from round to round.

    Every client continues from the server's factors. The server averages ``B`` and ``A`` separately:
    ``B = sum_c p_c B_c``, ``A = sum_c p_c A_c``. Nothing is merged: ``W = W^0 + s B A`` in all rounds. The
    method is inexact, because the mean of products is not the product of means.
    """

    name: ClassVar[str] = "fedit"
    family: ClassVar[Family] = "factor-averaging"
    traits: ClassVar[Traits] = Traits(
        averages_factors=True,
        step_on="factors",
        stable_parameters=True,
        uses_mean_only=True,
        sums_tensors=True,
        asynchronous=True,
    )
    numbers_down: ClassVar[str] = "r*(m + n)"
    limitation: ClassVar[str] = "inexact: the product of mean factors is not the mean of products"

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """``B = sum_c p_c B_c`` and ``A = sum_c p_c A_c`` become the next LoRA of every client."""
        from fedsmoothlora.algebra.averaging import mean_factors

        return ServerUpdate(model=mean_factors(uploads, weights, server.layers))
