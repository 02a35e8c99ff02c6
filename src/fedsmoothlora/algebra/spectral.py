"""Leading singular vectors of a dense matrix.

The gradient-aligned start needs ``2r`` of the ``min(m, n)`` singular vectors of a calibration gradient;
a full SVD would cost as much as a tenth of a short round of training (`docs/performance.md` has metrics).
"""

from functools import lru_cache

import torch
from torch import Tensor

from fedsmoothlora.errors import NotFiniteError

# Below this size, or where most directions are wanted anyway, a full SVD is quicker than iterating.
_FULL_SVD_BELOW = 96
_MOST_STEPS = 24


def leading_singular_vectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` leading singular triplets ``P (m, count)``, ``sigma (count,)``, ``Q (n, count)``.

    Block subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) with a Rayleigh-Ritz step,
    until every wanted triplet satisfies ``||G^T p_i - sigma_i q_i|| <= tolerance * sigma_count``, or as
    near as rounding lets it come; a matrix whose spectrum is too flat for that within a bounded number of
    steps, or small, takes the full SVD. The start block is fixed, so the function is pure. Signs are those
    that ``fix_signs`` gives.

    Args:
        matrix: ``G``, ``(m, n)``; computed in float32 or better.
        count: how many, ``0 <= count <= min(m, n)``.

    Raises:
        ValueError: ``count`` is out of range.
        NotFiniteError: the matrix is not finite.
    """
    P, sigma, Q = leading_singular_triplets(matrix, count)
    return fix_signs(P), sigma, fix_signs(Q)


def leading_singular_triplets(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `leading_singular_vectors`, but with signs that go together: ``P diag(sigma) Q^T`` is ``SVD_count``.

    The entry of largest magnitude of each column of ``P`` is positive.
    """
    m, n = matrix.shape
    if not 0 <= count <= min(m, n):
        raise ValueError(f"a {m} x {n} matrix has {min(m, n)} singular vectors; {count} were asked for")
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
    """Columns with their sign chosen so that the entry of largest magnitude is positive.

    Singular vectors are determined up to sign only; without a rule, equal inputs give unequal starts
    from one machine, dtype or algorithm to the next. Note that left and right vectors are fixed apart,
    so ``P diag(sigma) Q^T`` is no longer the matrix.
    """
    if vectors.numel() == 0:
        return vectors
    largest = vectors.abs().argmax(dim=0, keepdim=True)  # (1, columns)
    signs = torch.where(vectors.gather(0, largest) < 0, -1.0, 1.0).to(vectors.dtype)
    return vectors * signs


def _subspace_iteration(matrix: Tensor, count: int, width: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The triplets by subspace iteration, or None where they did not converge.

    A step multiplies by ``G^T G - beta/2 I``, ``beta`` the smallest eigenvalue in the block: eigenvalues in
    ``[0, beta]`` go to ``[-beta/2, beta/2]``, so what is not wanted shrinks twice as fast at no cost. After
    a few steps the columns stand in the order of their singular values (QR keeps it), and their images'
    norms tell both ``beta`` and how near the wanted ones are.
    """
    tolerance = 1e-4 if matrix.dtype == torch.float32 else 1e-8
    noise = 4 * torch.finfo(matrix.dtype).eps  # what rounding leaves, relative to sigma_1
    right = _start_block(matrix.shape[1], width).to(matrix)  # (n, width)
    beta, expected = 0.0, 1.0
    for step in range(_MOST_STEPS):
        image = matrix @ right  # (m, width)
        if step > 1:
            squares = image.square().sum(dim=0).tolist()  # one transfer
            beta = min(squares)
            above = squares[count - 1] - beta / 2
            expected *= min(1.0, beta / 2 / above) if above > 0 else 0.0
            if expected <= 10 * tolerance or step == _MOST_STEPS - 1:
                triplets, error = _rayleigh_ritz(matrix, right, image, count)
                sigma = triplets[1]
                if bool((error <= torch.clamp(tolerance * sigma[-1], min=noise * sigma[0])).all()):
                    return triplets
        # In this order of factors the library reads both row by row.
        power = (image.mT @ matrix).mT  # G^T G right, (n, width)
        right, _ = torch.linalg.qr(power.sub_(right, alpha=beta / 2) if beta else power)
    return None


def _rayleigh_ritz(
    matrix: Tensor, right: Tensor, image: Tensor, count: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The triplets that an orthonormal ``right`` with ``image = G right`` holds, and their residuals.

    ``G q_i = sigma_i p_i`` holds by construction; the residual is of ``G^T p_i = sigma_i q_i``.
    """
    left, core = torch.linalg.qr(image)  # (m, width), (width, width)
    U, sigma, Vt = torch.linalg.svd(core)
    P, sigma, Q = left @ U[:, :count], sigma[:count], right @ Vt[:count].mT
    return (P, sigma, Q), torch.linalg.vector_norm((P.mT @ matrix).mT - Q * sigma, dim=0)


@lru_cache(maxsize=64)
def _start_block(rows: int, columns: int) -> Tensor:
    """A fixed Gaussian block, float64, the same in every call and process; stored by columns, as QR's are."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64).mT.contiguous().mT
