"""The number of bits in which factors travel between server and clients.

With 32 and 16 bits, factors of products and single factors are sent as float32 and bfloat16. With 8, 4 or 3
bits (`fedsmoothlora.algebra.coding`), a product is sent as integers with one scale per direction; a LoRA that
clients keep from round to round, and a head that is trained whole, are sent as changes
(`fedsmoothlora.federation.changes`).

If sender and receiver both continue from a tensor, the sender also uses the decoded copy: the server merges
exactly the ``S^t`` that it sends, or backbones would drift apart. A client keeps its own ``U_c`` uncoded.

Everything else is float32: dense and compressed sums of updates, which are exact for decoded ``S^t``; control
variates; calibration gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsmoothlora.algebra.coding import Packed, bytes_for, code_product, coded_product, decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.sums import Matrix
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.federation.settings import Bits
from fedsmoothlora.methods import Layer, Update


@dataclass(frozen=True)
class Transport:
    """The form of factors on the way, and the conversion to it.

    Attributes:
        bits: ``transport.bits``.
    """

    bits: Bits = 32

    @property
    def packs(self) -> bool:
        """Whether factors travel as packed integers."""
        return self.bits < 16

    @property
    def number(self) -> torch.dtype:
        """The numbers of factors that are not packed."""
        return torch.bfloat16 if self.bits == 16 else torch.float32

    def coded(self, update: Coded) -> Coded:
        """The update as it travels; its bytes are those on the wire. Packed products stay as they are."""
        if self.bits == 32:  # nothing is coded, and float64 stays float64
            return update
        return {name: self._value(value) for name, value in update.items()}

    def code(self, matrix: Matrix, truncated: LowRank) -> LowRank | Packed:
        """``truncated = SVD_r(matrix)`` as it travels; packed, it is fitted to the whole matrix."""
        if self.packs:
            return code_product(matrix, truncated, self.bits)
        return truncated if self.bits == 32 else truncated.to(dtype=self.number)

    def product_bytes(self, layer: Layer, rank: int) -> int:
        """Bytes of a layer's product of this rank as it travels."""
        length = layer.m + layer.n
        if self.packs:
            return bytes_for(rank * length, self.bits) + torch.float32.itemsize * rank  # codes and scales
        return rank * length * self.number.itemsize

    def decoded(self, update: Coded) -> Update:
        """A received update in float32, which holds it exactly."""
        plain = decoded(update)
        if self.bits != 16:
            return plain
        return {name: value.to(dtype=torch.float32) for name, value in plain.items()}

    def rounded(self, product: LowRank) -> LowRank:
        """A product as numbers that can be sent, where those are rounded one by one."""
        return product.to(dtype=self.number).to(dtype=torch.float32) if self.bits == 16 else product

    def _value(self, value: LowRank | Tensor | Packed) -> LowRank | Tensor | Packed:
        if isinstance(value, Packed):
            return value
        if not self.packs:
            return value.to(dtype=self.number)
        if isinstance(value, LowRank):
            return coded_product(value, self.bits)
        raise TypeError("a plain tensor has no packed form of its own: it is sent as a change")
