"""Leading singular vectors of a dense matrix.

`leading_singular_vectors` and `leading_singular_triplets` iterate until they are exact up to a tolerance, and
serve truncations. The gradient-aligned start needs only the directions of the ``2r`` leading vectors of a
calibration gradient, for every layer, client and round: `leading_directions` takes a fixed number of steps.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fedsmoothlora.algebra.finite import all_finite
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.sums import Matrix, Sum, dense
from fedsmoothlora.errors import NotFiniteError

# Below this size, or if most directions are wanted, a full SVD is faster than iterating.
_FULL_SVD_BELOW = 96
_MOST_STEPS = 24
# On the calibration gradients of the packaged models, the subspaces of a start overlap with the exact ones by
# 0.9998 after two steps and by 1.00000 after three (docs/performance.md).
_DIRECTION_STEPS = 3
# The largest ratio sigma_width / sigma_count at which these steps suffice; there it is at most 0.5.
_DIRECTION_RATIO = 0.6
# Entries whose magnitudes differ by less than this share are equal up to the error of an algorithm.
SIGN_TIE = 1e-4


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
    P, sigma, Q = _triplets(matrix, count, _subspace_iteration)
    return fix_signs(P), sigma, fix_signs(Q)


def leading_singular_triplets(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `leading_singular_vectors`, but with matching signs, so that ``P diag(sigma) Q^T = SVD_count``.

    The signs of the columns of ``P`` are fixed by ``fix_signs``.
    """
    P, sigma, Q = _triplets(matrix, count, _subspace_iteration)
    signs = _signs(P)
    return P * signs, sigma, Q * signs


def leading_directions(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`leading_singular_vectors`, approximately, at 0.7 to 0.8 of the cost.

    Three steps of block subspace iteration with ``w = 2 count + 8`` columns shrink an unwanted direction by
    ``(sigma_(w+1) / sigma_i)^6`` relative to direction ``i``. If ``sigma_w > 0.6 sigma_count``, that is not
    enough, and the result is that of `leading_singular_vectors`. Arguments, results and errors are the same.
    """
    P, sigma, Q = _triplets(matrix, count, _power_steps, _subspace_iteration)
    return fix_signs(P), sigma, fix_signs(Q)


def leading_directions_of(matrices: Sequence[Tensor], count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`leading_directions` of matrices of one shape, dtype and device, in one stack.

    The stack's products, QR decompositions and SVDs are one call each, and its singular values are read once.
    A matrix whose spectrum is too flat is searched by itself. Arguments and errors are those of
    `leading_directions`; results are equal up to rounding.
    """
    m, n = matrices[0].shape
    width = min(2 * count + 8, m, n)
    if not (0 < count <= min(m, n) and _is_searched((m, n), width)):
        return [leading_directions(matrix, count) for matrix in matrices]
    stack = torch.stack(list(matrices))  # a copy
    stack = stack.to(torch.promote_types(stack.dtype, torch.float32))
    low, high = torch.aminmax(stack.flatten(1), dim=1)
    largest = torch.maximum(-low, high)
    if not all_finite(largest):
        raise NotFiniteError("cannot find singular vectors of a matrix that is not finite (NaN or infinity)")
    scale = largest.clamp(min=torch.finfo(stack.dtype).tiny)[:, None, None]
    P, sigma, Q = _stepped(stack.div_(scale), count, width, _DIRECTION_STEPS)
    flat = _is_too_flat(sigma, count).tolist()
    found = zip(fix_signs(P), (sigma * scale[:, 0])[:, :count], fix_signs(Q), strict=True)
    return [
        leading_directions(matrix, count) if is_flat else triplets
        for matrix, is_flat, triplets in zip(matrices, flat, found, strict=True)
    ]


def dominant_triplets(matrix: Matrix, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `leading_singular_triplets`, but after few products, however flat the spectrum is.

    For callers that keep what the triplets miss, such as error feedback: the remainder of a few rounds has no
    leading directions, and a search for them would never converge. The block has ``count + 8`` columns. Two
    power steps hold 0.9 to 1 of the energy that the exact triplets hold. A `Sum` takes two products with the
    memory instead of five: its block is ``Y M``, where the rows of ``Y`` are the leading left singular
    vectors of the new product and eight random ones. Over many rounds with feedback, models get as close to
    their target as with two power steps (docs/performance.md). Small matrices take the full SVD.
    """
    if isinstance(matrix, Sum) and _is_searched(matrix.shape, min(2 * count + 8, *matrix.shape)):
        P, sigma, Q = _guided(matrix, count)
    else:
        P, sigma, Q = _triplets(dense(matrix), count, _two_steps)
    signs = _signs(P)
    return P * signs, sigma[:count], Q * signs


def fix_signs(vectors: Tensor) -> Tensor:
    """Flip the sign of columns such that the entry of largest magnitude is positive.

    Among entries whose magnitudes agree to 1 part in 10,000, the first decides. Singular vectors are
    determined up to sign and rounding only. Without this rule, equal inputs could give different starts on
    other machines, in other dtypes or with other algorithms. Left and right vectors are fixed independently,
    so ``P diag(sigma) Q^T`` is no longer the matrix.

    Args:
        vectors: ``(..., rows, columns)``.
    """
    return vectors * _signs(vectors)


def _signs(vectors: Tensor) -> Tensor:
    """The factor 1 or -1 of each column in `fix_signs`, ``(..., 1, columns)``."""
    if vectors.numel() == 0:
        return vectors.new_ones((*vectors.shape[:-2], 1, vectors.shape[-1]))
    sizes = vectors.abs()
    largest = sizes >= (1 - SIGN_TIE) * sizes.amax(dim=-2, keepdim=True)
    first = largest.to(torch.uint8).argmax(dim=-2, keepdim=True)
    return torch.where(vectors.gather(-2, first) < 0, -1.0, 1.0).to(vectors.dtype)


_Triplets = tuple[Tensor, Tensor, Tensor]
# Takes the matrix, the number of triplets and the width of the block; None if the triplets were not found.
_Search = Callable[[Tensor, int, int], _Triplets | None]


def _triplets(matrix: Tensor, count: int, *searches: _Search) -> _Triplets:
    """The triplets with arbitrary signs, by the first search that finds them, or by the full SVD."""
    m, n = matrix.shape
    if not 0 <= count <= min(m, n):
        raise ValueError(f"a {m} x {n} matrix has {min(m, n)} singular vectors; {count} were requested")
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    # Gradients can be tiny; squares of their entries must not underflow.
    scale = _scale(matrix)
    matrix = matrix / scale
    width = min(2 * count + 8, min(m, n))
    found = None
    if _is_searched((m, n), width):
        found = next(filter(None, (search(matrix, count, width) for search in searches)), None)
    if found is None:
        P, sigma, Qt = torch.linalg.svd(matrix, full_matrices=False)
        found = P[:, :count], sigma[:count], Qt[:count].mT
    P, sigma, Q = found
    return P, sigma * scale, Q


def _is_searched(shape: tuple[int, int], width: int) -> bool:
    """Whether a block of this width is searched for in a matrix of this shape, and not taken from its SVD."""
    return min(shape) > _FULL_SVD_BELOW and 4 * width <= 3 * min(shape)


def _scale(matrix: Tensor) -> Tensor:
    """The largest magnitude, at least the smallest normal number. Raises ``NotFiniteError`` for NaN."""
    if matrix.numel() == 0:
        return matrix.new_ones(())
    low, high = torch.aminmax(matrix)
    largest = torch.maximum(-low, high)
    if not bool(torch.isfinite(largest)):
        raise NotFiniteError("cannot find singular vectors of a matrix that is not finite (NaN or infinity)")
    return largest.clamp(min=torch.finfo(matrix.dtype).tiny)


def _guided(matrix: Sum, count: int) -> _Triplets:
    """Approximate triplets of a sum in the row space that its new product and random rows point to."""
    known = _left_directions(matrix.product, count)  # (m, at most count)
    drawn = _start_block(known.shape[0], count + 8 - known.shape[1]).to(known)
    block = matrix.under(torch.cat([known, drawn], dim=1).mT)  # (count + 8, n)
    right = torch.linalg.qr((block / _scale(block)).mT).Q
    image = matrix.times(right)  # (m, count + 8)
    scale = _scale(image)
    P, sigma, Q = _rayleigh_ritz(right, image / scale, count)
    return P, sigma * scale, Q


def _left_directions(product: LowRank, count: int) -> Tensor:
    """The leading left singular vectors of a thin product, at most ``count``, times ``sqrt(m)``."""
    left = product.B @ torch.linalg.qr(product.A.mT, mode="r").R.mT  # B A = left Q^T
    left = left / _scale(left)
    squares, vectors = torch.linalg.eigh((left.mT @ left).double())
    vectors = vectors[:, squares > 1e-6 * squares[-1:]].flip(1)[:, :count]
    found = left @ vectors.to(left)
    return found * (math.sqrt(len(left)) / torch.linalg.vector_norm(found, dim=0))


def _two_steps(matrix: Tensor, count: int, width: int) -> _Triplets:
    """The triplets after two steps of a narrow block, with the singular values of the whole block."""
    return _stepped(matrix, count, min(count + 8, width), 2)


def _power_steps(matrix: Tensor, count: int, width: int) -> _Triplets | None:
    """The triplets after a fixed number of steps, or None if the spectrum is too flat for them."""
    P, sigma, Q = _stepped(matrix, count, width, _DIRECTION_STEPS)
    if bool(_is_too_flat(sigma, count)):
        return None
    return P, sigma[:count], Q


def _is_too_flat(sigma: Tensor, count: int) -> Tensor:
    """Whether `_DIRECTION_STEPS` are too few for the singular values ``(..., width)`` of a block."""
    noise = 16 * torch.finfo(sigma.dtype).eps * sigma[..., 0]
    return sigma[..., -1] > torch.maximum(_DIRECTION_RATIO * sigma[..., count - 1], noise)


def _stepped(matrix: Tensor, count: int, width: int, steps: int) -> _Triplets:
    """The triplets of ``(..., m, n)`` after a number of steps, with the singular values of the block."""
    right = _start_block(matrix.shape[-1], width).to(matrix)  # (n, width)
    for _ in range(steps):
        right = torch.linalg.qr(_squared(matrix, matrix @ right)).Q
    return _rayleigh_ritz(right, matrix @ right, count)


def _subspace_iteration(matrix: Tensor, count: int, width: int) -> _Triplets | None:
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
                P, sigma, Q = _rayleigh_ritz(right, image, count)
                sigma = sigma[:count]
                # G q_i = sigma_i p_i holds by construction; the residual is of G^T p_i = sigma_i q_i.
                error = torch.linalg.vector_norm((P.mT @ matrix).mT - Q * sigma, dim=0)
                if bool((error <= torch.clamp(tolerance * sigma[-1], min=noise * sigma[0])).all()):
                    return P, sigma, Q
        power = _squared(matrix, image)
        right, _ = torch.linalg.qr(power.sub_(right, alpha=beta / 2) if beta else power)
    return None


def _squared(matrix: Tensor, image: Tensor) -> Tensor:
    """``G^T G right``, ``(n, width)``, of ``image = G right``."""
    # With this order of factors, the library reads both matrices row by row.
    return (image.mT @ matrix).mT


def _rayleigh_ritz(right: Tensor, image: Tensor, count: int) -> _Triplets:
    """The triplets in the span of an orthonormal ``right`` with ``image = G right``.

    The vectors are the first ``count``; the singular values are those of the whole block.
    """
    left, core = torch.linalg.qr(image)  # (m, width), (width, width)
    U, sigma, Vt = torch.linalg.svd(core)
    return left @ U[..., :count], sigma, right @ Vt[..., :count, :].mT


@lru_cache(maxsize=64)
def _start_block(rows: int, columns: int) -> Tensor:
    """A fixed Gaussian block, float64, the same in every process; stored by columns, like QR's result."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64).mT.contiguous().mT
