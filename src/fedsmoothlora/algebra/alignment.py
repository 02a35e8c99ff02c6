"""The formulas of FedSmoothLoRA (arXiv 2605.29460) on plain tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fedsmoothlora.algebra.averaging import truncated_mean
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.sketches import Sketch
from fedsmoothlora.algebra.spectral import (
    dominant_triplets,
    leading_directions,
    leading_directions_of,
    leading_singular_triplets,
)
from fedsmoothlora.algebra.stacks import in_stacks, stacks_on
from fedsmoothlora.algebra.sums import Matrix, Sum, dense
from fedsmoothlora.algebra.update import Balance

StartMode = Literal["truncated", "exact"]

# Directions that only rounding made, relative to the first singular value.
_ROUNDING = 8 * torch.finfo(torch.float32).eps
# Below this share of sigma_1 a gradient's 2r-th singular value counts as zero.
_NO_GRADIENT = 1e-6


def gradient_aligned(gradient: Tensor | Sketch, rank: int, gamma: float, *, partial: bool = False) -> LowRank:
    """Step 3: ``B_ga = c P[:, r:2r]``, ``A_ga = c Q[:, :r]^T``, ``c = m^(1/4) / sqrt(gamma)``.

    ``G = P diag(sigma) Q^T``; the singular values are not used (LoRA-GA, arXiv 2407.05000, direction
    "ArB2r", scale "stable"). The vectors are those of `leading_directions`; `fix_signs` fixes the signs of
    the columns of ``P[:, r:2r]`` and of ``Q[:, :r]``. All ``r`` singular values of the product equal
    ``sqrt(m) / gamma``.

    Args:
        gradient: ``G``, ``(m, n)``, or what a sketch of it knows.
        rank: ``r``; ``2r <= min(m, n)``.
        gamma: stabiliser, above 0.
        partial: where ``G`` has ``d < 2r`` directions, ``sigma_i >= 1e-6 sigma_1``, take ``k = floor(d / 2)``
            of each side, ``P[:, k:2k]`` and ``Q[:, :k]``.

    Returns:
        The product, rank ``r``; where ``G`` has fewer than ``2r`` directions, rank ``k`` if ``partial``,
        otherwise the zero product (rank 0).

    Raises:
        ValueError: ``2r > min(m, n)`` without ``partial``, gamma is not above 0, or the gradient is not
            finite.
    """
    return gradients_aligned([gradient], [rank], gamma, partial=partial)[0]


def gradients_aligned(
    gradients: Sequence[Tensor | Sketch], ranks: Sequence[int], gamma: float, *, partial: bool = False
) -> list[LowRank]:
    """`gradient_aligned` of many layers, each with its own rank.

    On devices that stack (`stacks`), gradients of one shape are searched together, with equal results up to
    rounding. On other devices each is searched by itself.
    """
    counts = []
    for gradient, rank in zip(gradients, ranks, strict=True):
        m, n = gradient.shape
        if rank < 1 or (2 * rank > min(m, n) and not partial):
            raise ValueError(
                f"a gradient-aligned start of rank {rank} needs {2 * rank} singular vectors; "
                f"a {m} x {n} gradient has {min(m, n)}: choose a rank from 1 to {min(m, n) // 2}"
            )
        if not gamma > 0:
            raise ValueError(f"gamma must be above 0; got {gamma}")
        counts.append(min(2 * rank, m, n))
    found = in_stacks(list(zip(gradients, counts, strict=True)), _alike, _numbers, _directions)
    if not found:
        return []
    # All singular values are read at once.
    values = torch.cat([sigma for _, sigma, _ in found]).cpu().split(counts)
    return [
        _aligned(P, Q, sigma, rank, gamma, partial)
        for (P, _, Q), sigma, rank in zip(found, values, ranks, strict=True)
    ]


def _alike(one: tuple[Tensor | Sketch, int]) -> tuple[object, ...]:
    """Equal for gradients that may be searched together."""
    gradient, count = one
    if isinstance(gradient, Sketch):
        return (id(gradient),)
    return gradient.shape, count, gradient.dtype, gradient.device


def _numbers(one: tuple[Tensor | Sketch, int]) -> int:
    return math.prod(one[0].shape)


def _directions(items: Sequence[tuple[Tensor | Sketch, int]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The leading directions of gradients that are alike."""
    matrices = [gradient for gradient, _ in items if isinstance(gradient, Tensor)]
    if len(matrices) > 1 and stacks_on(matrices[0].device):
        return leading_directions_of(matrices, items[0][1])
    return [
        gradient.leading_singular_vectors(count)
        if isinstance(gradient, Sketch)
        else leading_directions(gradient, count)
        for gradient, count in items
    ]


def _aligned(P: Tensor, Q: Tensor, sigma: Tensor, rank: int, gamma: float, partial: bool) -> LowRank:
    """The product of step 3 of the ``2r`` leading directions, ``P (m, 2r)`` and ``Q (n, 2r)``."""
    m, n = P.shape[0], Q.shape[0]
    there = 0 if sigma[0] == 0 else int((sigma >= _NO_GRADIENT * sigma[0]).sum())
    k = rank if there == 2 * rank else there // 2 if partial else 0
    if k == 0:
        return LowRank.zeros(m, n, dtype=P.dtype, device=str(P.device))
    scale = m**0.25 / math.sqrt(gamma)
    return LowRank(scale * P[:, k : 2 * k], scale * Q[:, :k].mT.contiguous())


def randomly_aligned(m: int, n: int, rank: int, gamma: float, generator: torch.Generator) -> LowRank:
    """The ablation of step 3: random orthonormal directions, all singular values ``sqrt(m) / gamma`` too."""
    P = torch.linalg.qr(torch.randn(m, rank, generator=generator)).Q
    Q = torch.linalg.qr(torch.randn(n, rank, generator=generator)).Q
    scale = m**0.25 / math.sqrt(gamma)
    return LowRank(scale * P, scale * Q.mT.contiguous())


def round_matching(
    upload: LowRank,
    server_updates: Sequence[LowRank],
    zeta: float,
    *,
    staleness: float = 0.5,
    missed: int | None = None,
) -> LowRank:
    """Step 1: ``R = zeta rho^k (U_c - (S^tau + ... + S^{t-1}))``, exactly, never as a dense matrix.

    Args:
        upload: ``U_c``, the client's last accepted upload, from round ``tau``.
        server_updates: ``S^tau ... S^{t-1}``, or their sum as one product.
        zeta: ``zeta_t``.
        staleness: ``rho``, in [0, 1].
        missed: ``k = t - 1 - tau``, the rounds that the client missed; the number of updates less one
            unless given.

    Returns:
        ``R``, of rank at most the sum of all ranks; the zero product (rank 0) where the factor is 0, or
        where upload and updates differ by rounding only.

    Raises:
        ValueError: ``missed`` is negative, ``zeta`` or ``staleness`` is outside [0, 1], or shapes differ.
    """
    if missed is None:
        missed = max(len(server_updates) - 1, 0)
    if missed < 0:
        raise ValueError(f"a client cannot have missed {missed} rounds")
    if not (0 <= zeta <= 1 and 0 <= staleness <= 1):
        raise ValueError(f"zeta and staleness must be from 0 to 1; got {zeta} and {staleness}")
    difference = LowRank.weighted_sum([upload, *server_updates], [1.0] + [-1.0] * len(server_updates))
    factor = zeta * staleness**missed
    size = sum(math.sqrt(max(product.inner(product), 0.0)) for product in (upload, *server_updates))
    # The rounding error of equal products is no direction to start in; it would displace the aligned start.
    if factor == 0 or _is_rounding(difference, size):
        return LowRank.zeros(*upload.shape, dtype=difference.dtype, device=str(upload.device))
    return difference if factor == 1 else difference * factor


def _is_rounding(difference: LowRank, size: float) -> bool:
    """Whether a difference of products with norms that sum to ``size`` is what rounding leaves of equal ones.

    By Gram matrices where these can tell (they err by rounding times ``size``), since QRs cost far more.
    """
    if difference.inner(difference) > 1e-4 * size**2:
        return False
    return difference.norm() <= 16 * torch.finfo(difference.dtype).eps * size


def start_factors(
    ga: LowRank,
    rm: LowRank,
    rank: int | None,
    mode: StartMode = "truncated",
    balance: Balance = "sqrt",
) -> tuple[LowRank, LowRank]:
    """Step 4: the LoRA product and the shift of the backbone, ``W^t + s * shift``.

    ``truncated`` (the paper): ``L = SVD_r(GA + R)``, shift ``-GA``. ``exact``: the same ``L``, shift
    ``R - L``, so that training begins at exactly ``W^t + s R``. Wherever ``R = 0`` the factors are GA's
    own: all its singular values are equal, so that an SVD would rotate them arbitrarily.

    Args:
        ga: ``B_ga A_ga``, or a product of zero.
        rm: ``R``, or a product of zero.
        rank: ``r``; ``None`` never truncates.
        mode: ``truncated`` or ``exact``.
        balance: of the SVD's factors.

    Returns:
        ``(lora, shift)``; ``lora`` has fewer than ``r`` columns where ``GA + R`` has lower rank.

    Raises:
        ValueError: unknown mode, or shapes differ.
    """
    lora, shift, _ = start_with_error(ga, rm, rank, mode, balance)
    return lora, shift


def start_with_error(
    ga: LowRank,
    rm: LowRank,
    rank: int | None,
    mode: StartMode = "truncated",
    balance: Balance = "sqrt",
) -> tuple[LowRank, LowRank, float]:
    """`start_factors`, and the squared error of the truncation, ``||L - GA - R||^2``."""
    return starts_with_errors([ga], [rm], [rank], mode, balance)[0]


def starts_with_errors(
    gas: Sequence[LowRank],
    rms: Sequence[LowRank],
    ranks: Sequence[int | None],
    mode: StartMode = "truncated",
    balance: Balance = "sqrt",
) -> list[tuple[LowRank, LowRank, float]]:
    """`start_with_error` of many layers, which `LowRank.truncated_sums` truncates."""
    if mode not in ("truncated", "exact"):
        raise ValueError(f"start must be 'truncated' or 'exact'; got {mode!r}")
    found: list[tuple[LowRank, LowRank, float]] = [(ga, -ga, 0.0) for ga in gas]
    # A direction that only rounding made is dropped, so that `trainable` can give it a row that moves.
    groups: dict[float, list[int]] = {}
    for place, (ga, rm, rank) in enumerate(zip(gas, rms, ranks, strict=True)):
        if rm.rank == 0 or (rm.inner(rm) <= 0 and rm.norm() == 0.0):
            continue
        dtype = torch.promote_types(torch.promote_types(ga.dtype, rm.dtype), torch.float32)
        rounding = 0.0 if rank is None else 8 * torch.finfo(dtype).eps
        groups.setdefault(rounding, []).append(place)
    for rounding, places in groups.items():
        sums = LowRank.truncated_sums(
            [(gas[place], rms[place]) for place in places],
            [ranks[place] for place in places],
            balance,
            tolerance=rounding,
        )
        for place, (lora, error) in zip(places, sums, strict=True):
            shift = -gas[place] if mode == "truncated" else rms[place] - lora
            found[place] = lora, shift, error
    return found


def trainable(lora: LowRank, rank: int, generator: torch.Generator) -> LowRank:
    """``lora`` with ``rank`` columns: missing directions get a zero column in ``B``, a random row in ``A``.

    The product is unchanged and training can move (a direction that is zero in both factors has no
    gradient in either). Rows are drawn as PEFT draws ``lora_A``: uniform within ``1/sqrt(n)``.
    """
    missing = rank - lora.rank
    if missing <= 0:
        return lora
    m, n = lora.shape
    rows = (torch.rand(missing, n, generator=generator) * 2 - 1) / math.sqrt(n)
    return LowRank(
        torch.cat([lora.B, lora.B.new_zeros(m, missing)], dim=1),
        torch.cat([lora.A, rows.to(lora.A)], dim=0),
    )


def factor_gradients(gradient: Tensor, lora: LowRank, scale: float) -> LowRank:
    """``dLoss/dB = s G A^T`` and ``dLoss/dA = s B^T G``, of the weight ``W + s B A``, as the two factors.

    Args:
        gradient: ``G = dLoss/dW``, ``(m, n)``.
        lora: ``B A``.
        scale: ``s``.
    """
    G = gradient.to(lora.B)
    return LowRank(scale * (G @ lora.A.mT), scale * (lora.B.mT @ G))


def upload_product(lora: LowRank, shift: LowRank, rank: int | None, balance: Balance = "sqrt") -> LowRank:
    """Step 6: ``U_c = SVD_r(B A + shift)``; ``rank=None`` never truncates."""
    return upload_products([lora], [shift], [rank], balance)[0]


def upload_products(
    loras: Sequence[LowRank],
    shifts: Sequence[LowRank],
    ranks: Sequence[int | None],
    balance: Balance = "sqrt",
) -> list[LowRank]:
    """`upload_product` of many layers, which `LowRank.truncated_sums` truncates."""
    sums = LowRank.truncated_sums(list(zip(loras, shifts, strict=True)), ranks, balance)
    return [product for product, _ in sums]


def truncated(matrix: Matrix, rank: int, balance: Balance = "sqrt", *, feeds_back: bool = False) -> LowRank:
    """``SVD_r`` of a product, a dense matrix or a sum, whose leading singular vectors alone are computed.

    With ``feeds_back``, a few products with a large matrix must do: the caller keeps the remainder, and sends
    it in a later round.
    """
    if rank == 0:
        return LowRank.zeros(*matrix.shape, dtype=matrix.dtype, device=str(matrix.device))
    whole = matrix.formed() if isinstance(matrix, Sum) and matrix.is_thin else matrix
    if isinstance(whole, LowRank) and 4 * whole.rank <= min(whole.shape):
        return whole.truncate(rank, balance, tolerance=_ROUNDING)
    count = min(rank, *matrix.shape)
    if feeds_back:
        P, sigma, Q = dominant_triplets(whole, count)
    else:
        P, sigma, Q = leading_singular_triplets(dense(whole), count)
    there = int((sigma > _ROUNDING * sigma.amax()).sum()) if len(sigma) else 0
    P, sigma, Q = P[:, :there], sigma[:there], Q[:, :there]
    if balance == "left":
        return LowRank(P * sigma, Q.mT.contiguous())
    root = sigma.sqrt()
    return LowRank(P * root, (Q * root).mT.contiguous())


def squared_norm(matrix: LowRank | Tensor) -> float:
    """``||M||_F^2``."""
    norm = matrix.norm() if isinstance(matrix, LowRank) else float(torch.linalg.matrix_norm(matrix))
    return norm**2


def average(
    uploads: Sequence[LowRank],
    weights: Sequence[float],
    rank: int | None,
    balance: Balance = "sqrt",
) -> LowRank:
    """The server's ``S^t = SVD_r(sum_c p_c U_c)``, ``p_c = weights_c / sum(weights)``.

    Products are averaged, not factors. ``rank=None`` never truncates.

    Raises:
        ValueError: nothing to average, a weight below 0 or not finite, weights that sum to 0, or shapes
            that differ.
    """
    return truncated_mean(uploads, weights, rank, balance)


def feedback(left: LowRank | None, mean: LowRank, merged: LowRank, zeta: float, rank: int | None) -> LowRank:
    """``E^{t+1} = E^t + (1 - zeta_{t+1}) (avg - S^t)``, at most of rank ``rank``.

    Args:
        left: ``E^t``; None for 0.
        mean: ``avg``, not truncated.
        merged: ``S^t``.
        zeta: ``zeta_{t+1}``.
        rank: where the memory is cut off; ``None`` keeps all.
    """
    parts, factors = [mean, merged], [1 - zeta, zeta - 1]
    if left is not None:
        parts, factors = [left, *parts], [1.0, *factors]
    total = LowRank.weighted_sum(parts, factors)
    # Directions that only rounding made would fill the memory up with nothing.
    return total.truncate(rank, tolerance=8 * torch.finfo(total.dtype).eps)
