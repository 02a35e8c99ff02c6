"""The sum of a memory and a product, which is multiplied by thin matrices without being formed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank


@dataclass(frozen=True, slots=True, eq=False)
class Sum:
    """``M = E + B A``, ``(m, n)``: what error feedback has kept so far, and a new product.

    For large dense ``E``, forming ``M`` takes as long as several products of it with a thin matrix.

    Attributes:
        memory: ``E``, dense or a product.
        product: ``B A``.
    """

    memory: LowRank | Tensor
    product: LowRank

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)``."""
        return self.product.shape

    @property
    def dtype(self) -> torch.dtype:
        """The memory's dtype."""
        return self.memory.dtype

    @property
    def device(self) -> torch.device:
        """The device of both."""
        return self.memory.device

    @property
    def is_thin(self) -> bool:
        """Whether ``M`` is a product of rank at most a quarter of ``min(m, n)``."""
        memory = self.memory
        return isinstance(memory, LowRank) and 4 * (memory.rank + self.product.rank) <= min(self.shape)

    def formed(self) -> LowRank | Tensor:
        """``M`` itself, as `plus` gives it."""
        return plus(self.product, self.memory)

    def times(self, columns: Tensor) -> Tensor:
        """``M X``, ``(m, w)``, of ``X (n, w)``."""
        product, memory = self.product, self.memory
        dense = memory.B @ (memory.A @ columns) if isinstance(memory, LowRank) else memory @ columns
        return dense.addmm_(product.B.to(dense), product.A.to(dense) @ columns)

    def under(self, rows: Tensor) -> Tensor:
        """``Y M``, ``(w, n)``, of ``Y (w, m)``."""
        product, memory = self.product, self.memory
        dense = (rows @ memory.B) @ memory.A if isinstance(memory, LowRank) else rows @ memory
        return dense.addmm_(rows @ product.B.to(dense), product.A.to(dense))


# The matrices that a method truncates and codes.
Matrix = LowRank | Tensor | Sum


def plus(one: LowRank | Tensor, other: LowRank | Tensor | None) -> LowRank | Tensor:
    """The sum, dense where one of both is, or where that is smaller than the factors of the sum."""
    if other is None:
        return one
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        m, n = one.shape
        if (one.rank + other.rank) * (m + n) <= m * n:
            return one + other
    dense = other.dense() if isinstance(other, LowRank) else other
    if isinstance(one, LowRank):
        return torch.addmm(dense, one.B.to(dense), one.A.to(dense))
    return one + dense


def dense(matrix: Matrix) -> Tensor:
    """``M`` as a dense matrix."""
    if isinstance(matrix, Sum):
        matrix = matrix.formed()
    return matrix.dense() if isinstance(matrix, LowRank) else matrix


def unformed(product: LowRank, memory: LowRank | Tensor | None) -> Matrix:
    """The sum, not formed unless ``product`` has more numbers than the matrix."""
    m, n = product.shape
    if memory is None or product.rank * (m + n) > m * n:
        return plus(product, memory)
    return Sum(memory, product)


def remainder(matrix: Matrix, sent: LowRank, *, overwrites: bool = False) -> LowRank | Tensor:
    """``M - S``, dense once that is smaller than its factors.

    Args:
        matrix: ``M``.
        sent: ``S``.
        overwrites: whether a dense memory of a `Sum` may be overwritten by the result, which saves the time
            and the memory of a copy.
    """
    if isinstance(matrix, Sum) and isinstance(matrix.memory, Tensor):
        change = matrix.product - sent
        memory = matrix.memory if overwrites else matrix.memory.clone()
        return memory.addmm_(change.B.to(memory), change.A.to(memory))
    if isinstance(matrix, Sum):
        matrix = matrix.formed()
    m, n = sent.shape
    if isinstance(matrix, LowRank) and (matrix.rank + sent.rank) * (m + n) <= m * n:
        return matrix - sent
    dense = matrix.dense() if isinstance(matrix, LowRank) else matrix
    return torch.addmm(dense, sent.B.to(dense), sent.A.to(dense), alpha=-1.0)
