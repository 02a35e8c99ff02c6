"""Linear uploads in a shared subspace, as PowerSGD (arXiv 1905.13727) compresses gradients.

Server and clients hold the same orthonormal ``Q (n, r)``. Client ``c`` has the change ``M_c (m, n)``, with
weight ``p_c``. A round has two sums::

    P_c = M_c Q               P = orth(sum_c p_c P_c)
    R_c = M_c^T P K           R = sum_c p_c R_c,  K = (P^T P + 1e-6 I)^-1
    E_c = M_c - P R_c^T       S = P R^T

``Q`` of the next round is ``orth(R)``. Both sums are linear in the uploads, so the server has to know nothing
but sums. ``P_c`` and ``Q`` only steer the subspace: errors in them lose nothing, because ``E_c`` takes up all
that ``P R_c^T`` leaves of ``M_c``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.sums import Matrix, Sum

# Added to the diagonal of ``P^T P``: a ``P`` that was rounded on its way is not orthonormal.
RIDGE = 1e-6
# A column is noise if its part outside the span of those before it is at most this share of the largest one.
_NOISE = 8 * torch.finfo(torch.float32).eps
# Above this condition number, orthonormal columns depend on the machine that computes them.
_LARGEST_CONDITION = 1e3


def orthonormal(columns: Tensor, generator: torch.Generator) -> Tensor:
    """An orthonormal basis ``(n, r)`` whose span contains the columns, computed in float64.

    By Gram-Schmidt, twice. Columns that are zero or tiny, or lie in the span of those before them, would be
    noise after normalisation. They are replaced by random directions, orthogonal to all others.

    Args:
        columns: ``(n, r)`` with ``r <= n``.
        generator: draws the random directions, on the CPU.
    """
    given = columns.double()
    n, r = given.shape
    basis = torch.zeros_like(given)
    least = _NOISE * float(torch.linalg.vector_norm(given, dim=0).max()) if r else 0.0
    replaced = []
    for index in range(r):
        left = _outside(given[:, index], basis)
        size = float(torch.linalg.vector_norm(left))
        if size <= least:
            replaced.append(index)
        else:
            basis[:, index] = _outside(left / size, basis)
            basis[:, index] /= torch.linalg.vector_norm(basis[:, index])
    for index in replaced:
        drawn = torch.randn(n, generator=generator, dtype=torch.float64).to(given.device)
        left = _outside(drawn, basis)
        left = _outside(left / torch.linalg.vector_norm(left), basis)
        basis[:, index] = left / torch.linalg.vector_norm(left)
    return basis.to(columns.dtype)


def is_reproducible(columns: Tensor) -> bool:
    """Whether every machine computes the same `orthonormal` basis of the columns, up to small rounding."""
    if columns.shape[1] == 0:
        return True
    values = torch.linalg.svdvals(columns.double())
    return bool(values[-1] * _LARGEST_CONDITION > values[0])


def projected(matrix: Matrix, basis: Tensor) -> Tensor:
    """``M Q``, ``(m, r)``."""
    if isinstance(matrix, Sum):
        return matrix.times(basis)
    return matrix.B @ (matrix.A @ basis) if isinstance(matrix, LowRank) else matrix @ basis


def coordinates(matrix: Matrix, left: Tensor) -> Tensor:
    """``R = M^T P K``, ``(n, r)``; ``P R^T`` is the part of ``M`` in the span of ``P``, up to the ridge."""
    rows = left.mT
    if isinstance(matrix, Sum):
        product = matrix.under(rows)
    elif isinstance(matrix, LowRank):
        product = (rows @ matrix.B) @ matrix.A
    else:
        product = rows @ matrix
    return (_inverse_gram(left).to(product) @ product).mT


def product(left: Tensor, right: Tensor) -> LowRank:
    """``P R^T`` for ``P (m, r)`` and ``R (n, r)``."""
    return LowRank(left, right.mT.contiguous())


def _outside(vector: Tensor, basis: Tensor) -> Tensor:
    """The part of a vector that is orthogonal to the basis, projected twice because one projection rounds."""
    for _ in range(2):
        vector = vector - basis @ (basis.mT @ vector)
    return vector


def _inverse_gram(left: Tensor) -> Tensor:
    """``K = (P^T P + 1e-6 I)^-1``, in float64."""
    wide = left.double()
    gram = wide.mT @ wide
    return torch.linalg.inv(gram + RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
