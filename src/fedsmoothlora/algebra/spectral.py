"""Leading singular vectors of a dense matrix.

The gradient-aligned start needs ``2r`` of the ``min(m, n)`` singular vectors of a calibration gradient. A
full SVD would take about a tenth of the time of a short round of training (measured in
`docs/performance.md`).
"""

from functools import lru_cache

import torch
from torch import Tensor

from fedsmoothlora.errors import NotFiniteError

# Below this size, or if most directions are wanted, a full SVD is faster than iterating.
_FULL_SVD_BELOW = 96
_MOST_STEPS = 24


def leading_singular_vectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` leading singular triplets ``P (m, count)``, ``sigma (count,)``, ``Q (n, count)``.

    Computed by block subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) with a
    Rayleigh-Ritz step, until every wanted triplet satisfies ``||G^T p_i - sigma_i q_i|| <= tolerance *
    sigma_count`` up to rounding. Small matrices, and matrices whose spectrum is so flat that a bounded number
    of steps does not suffice, take the full SVD. The start block is fixed, so the function is deterministic.
    Signs are fixed by ``fix_signs``.

    Args:
        matrix: ``G``, ``(m, n)``; computed in float32 or better.
        count: number of triplets, ``0 <= count <= min(m, n)``.

    Raises:
        ValueError: ``count`` is out of range.
        NotFiniteError: the matrix is not finite.
    """
    P, sigma, Q = leading_singular_triplets(matrix, count)
    return fix_signs(P), sigma, fix_signs(Q)


def leading_singular_triplets(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `leading_singular_vectors`, but with matching signs, so that ``P diag(sigma) Q^T = SVD_count``.

    The entry of largest magnitude of each column of ``P`` is positive.
    """
    m, n = matrix.shape
    if not 0 <= count <= min(m, n):
        raise ValueError(f"a {m} x {n} matrix has {min(m, n)} singular vectors; {count} were requested")
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if not bool(torch.isfinite(matrix).all()):
        raise NotFiniteError("cannot find singular vectors of a matrix that is not finite (NaN or infinity)")
    # Gradients can be tiny; squares of their entries must not underflow.
    scale = matrix.abs().max().clamp(min=torch.finfo(matrix.dtype).tiny) if matrix.numel() else 1.0
    matrix = matrix / scale
    width = min(2 * count + 8, min(m, n))
    triplets = None
    if min(m, n) > _FULL_SVD_BELOW and 4 * width <= 3 * min(m, n):
        triplets = _subspace_iteration(matrix, count, width)
    if triplets is None:
        P, sigma, Qt = torch.linalg.svd(matrix, full_matrices=False)
        triplets = P[:, :count], sigma[:count], Qt[:count].mT
    P, sigma, Q = triplets
    fixed = fix_signs(P)
    signs = torch.where((fixed == P).all(dim=0), 1.0, -1.0).to(Q.dtype)
    return fixed, sigma * scale, Q * signs


def fix_signs(vectors: Tensor) -> Tensor:
    """Flip the sign of columns such that the entry of largest magnitude is positive.

    Singular vectors are determined up to sign only. Without this rule, equal inputs could give different
    starts on other machines, in other dtypes or with other algorithms. Left and right vectors are fixed
    independently, so ``P diag(sigma) Q^T`` is no longer the matrix.
    """
    if vectors.numel() == 0:
        return vectors
    largest = vectors.abs().argmax(dim=0, keepdim=True)  # (1, columns)
    signs = torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0).to(vectors.dtype)
    return vectors * signs


def _subspace_iteration(matrix: Tensor, count: int, width: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The triplets by subspace iteration, or None if they did not converge.

    A step multiplies by ``G^T G - beta/2 I``, where ``beta`` is the smallest eigenvalue in the block. It maps
    eigenvalues in ``[0, beta]`` to ``[-beta/2, beta/2]``, so unwanted directions shrink twice as fast at no
    cost. After a few steps the columns are in the order of their singular values (QR keeps the order), and
    the norms of their images give ``beta`` and an estimate of the convergence.
    """
    tolerance = 1e-4 if matrix.dtype == torch.float32 else 1e-8
    noise = 4 * torch.finfo(matrix.dtype).eps  # rounding error relative to sigma_1
    right = _start_block(matrix.shape[1], width).to(matrix)  # (n, width)
    beta, expected = 0.0, 1.0
    for step in range(_MOST_STEPS):
        image = matrix @ right  # (m, width)
        if step > 1:
            squares = image.square().sum(dim=0).tolist()  # a single transfer from the device
            beta = min(squares)
            above = squares[count - 1] - beta / 2
            expected *= min(1.0, beta / 2 / above) if above > 0 else 0.0
            if expected <= 10 * tolerance or step == _MOST_STEPS - 1:
                triplets, error = _rayleigh_ritz(matrix, right, image, count)
                sigma = triplets[1]
                if bool((error <= torch.clamp(tolerance * sigma[-1], min=noise * sigma[0])).all()):
                    return triplets
        # With this order of factors, the library reads both matrices row by row.
        power = (image.mT @ matrix).mT  # G^T G right, (n, width)
        right, _ = torch.linalg.qr(power.sub_(right, alpha=beta / 2) if beta else power)
    return None


def _rayleigh_ritz(
    matrix: Tensor, right: Tensor, image: Tensor, count: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The triplets in the span of an orthonormal ``right`` with ``image = G right``, and their residuals.

    ``G q_i = sigma_i p_i`` holds by construction; the residual is of ``G^T p_i = sigma_i q_i``.
    """
    left, core = torch.linalg.qr(image)  # (m, width), (width, width)
    U, sigma, Vt = torch.linalg.svd(core)
    P, sigma, Q = left @ U[:, :count], sigma[:count], right @ Vt[:count].mT
    return (P, sigma, Q), torch.linalg.vector_norm((P.mT @ matrix).mT - Q * sigma, dim=0)


@lru_cache(maxsize=64)
def _start_block(rows: int, columns: int) -> Tensor:
    """A fixed Gaussian block, float64, the same in every process; stored by columns, like QR's result."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64).mT.contiguous().mT
