"""The number format in which factors travel between server and clients.

Factors of products and single factors are coded: ``S^t``, the LoRA that the server sends, and uploads.
If sender and receiver both continue from a tensor, the sender also uses the rounded copy: the server merges
exactly the ``S^t`` that it sends, or backbones would drift apart. A client keeps its own ``U_c`` uncoded.

Everything else is float32: compressed and dense sums of updates, which are exact for decoded ``S^t``; a head
that is trained whole; control variates; calibration gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.methods import Products, Update


@dataclass(frozen=True)
class Transport:
    """The number format of factors on the way, and the conversion to it and back.

    Attributes:
        dtype: ``transport.dtype``.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def number(self) -> torch.dtype:
        """The numbers as torch calls them."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def coded(self, update: Update) -> Update:
        """The update as it travels; its bytes are those on the wire."""
        return self._in(update, self.number)

    def decoded(self, update: Update) -> Update:
        """A received update in float32, which holds it exactly."""
        return self._in(update, torch.float32)

    def received(self, products: Products) -> Products:
        """Products as their receivers have them: coded and decoded."""
        return {name: self.product(product) for name, product in products.items()}

    def product(self, product: LowRank) -> LowRank:
        """One product, coded and decoded."""
        return product if self.dtype == "float32" else product.to(dtype=self.number).to(dtype=torch.float32)

    def _in(self, update: Update, number: torch.dtype) -> Update:
        if self.dtype == "float32":  # nothing is coded, and float64 stays float64
            return update
        return {name: value.to(dtype=number) for name, value in update.items()}
