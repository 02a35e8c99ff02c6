"""Diagnostic metrics that help to explain a run. They are exact, and use low-rank forms where possible."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Part, Products, Update


class StartDiagnosis:
    """The effect of truncating a start, over all layers.

    ``start_error = ||SVD_r(GA + R) - GA - R|| / ||R||`` and ``ga_kept = <SVD_r(GA + R), GA> / ||GA||^2``,
    where squared norms and inner products are summed over the layers.
    """

    def __init__(self) -> None:
        self._error = self._match = self._kept = self._aligned = 0.0

    def add(self, lora: LowRank, ga: LowRank, rm: LowRank, error: float) -> None:
        """Add a layer, with the squared error of its truncation, ``||SVD_r(GA + R) - GA - R||^2``."""
        if rm.rank:
            self._error += error
            self._match += rm.norm() ** 2
        if ga.rank:
            self._kept += lora.inner(ga)
            self._aligned += ga.inner(ga)

    def metrics(self) -> dict[str, float]:
        """The metrics by name; ``start_error`` is missing if ``R`` is 0, and ``ga_kept`` if ``GA`` is 0."""
        found = {}
        if self._match:
            found["start_error"] = math.sqrt(self._error / self._match)
        if self._aligned:
            found["ga_kept"] = self._kept / self._aligned
        return found


def gradient_cosine(
    gradients: Mapping[str, Tensor],
    lora: Products,
    trains: Sequence[Part] = ("B", "A"),
    cores: Mapping[str, Tensor] = MappingProxyType({}),
) -> float | None:
    """The cosine of the gradient and the first step of LoRA, ``cos(G, B B^T G + G A^T A)``, over all layers.

    A small step of gradient descent on the factors moves ``B A`` by ``- lr s (G A^T A + B B^T G)``. The first
    term comes from training ``B``, the second from training ``A``. LoRA-GA (arXiv 2407.05000) aligns this
    step with ``G``. Training ``R`` of ``B R A`` alone moves that product by ``- lr s B B^T G A^T A``; only
    those entries of ``B^T G A^T`` count that are in a block of ``R``.

    The cosine is 1 if the step is parallel to the full gradient, and 0 if it is orthogonal.

    The step is not formed. With ``X = G A^T`` and ``Y = B^T G``, the inner products are
    ``<G, X A> = ||X||^2``, ``<G, B Y> = ||Y||^2``, ``||X A||^2 = <X^T X, A A^T>``,
    ``||B Y||^2 = <B^T B, Y Y^T>`` and ``<X A, B Y> = ||B^T X||^2``.

    Args:
        gradients: ``G`` of the layers' weights, ``(m, n)``, at the start.
        lora: the factors at the start.
        trains: the parts that are trained.
        cores: ``R`` by layer, if it is trained: its square blocks below each other.

    Returns:
        The cosine; None if the gradient or the step is zero.
    """
    inner = step_square = gradient_square = 0.0
    for name, product in lora.items():
        G = gradients[name]
        X, Y = G @ product.A.mT, product.B.mT @ G  # (m, r), (r, n)
        if "B" in trains:
            inner += float(X.square().sum())
            step_square += float(((X.mT @ X) * (product.A @ product.A.mT)).sum())
        if "A" in trains:
            inner += float(Y.square().sum())
            step_square += float(((product.B.mT @ product.B) * (Y @ Y.mT)).sum())
        if "A" in trains and "B" in trains:
            step_square += 2 * float((product.B.mT @ X).square().sum())
        if "R" in trains:
            r, size = cores[name].shape
            core = product.B.mT @ X  # (r, r)
            moved = torch.block_diag(*[G.new_ones(size, size)] * (r // size)) * core
            inner += float((core * moved).sum())
            step_square += float(
                ((product.B.mT @ product.B @ moved) * (moved @ product.A @ product.A.mT)).sum()
            )
        gradient_square += float(G.square().sum())
    if not step_square or not gradient_square:
        return None
    return inner / math.sqrt(step_square * gradient_square)


def spread(starts: Sequence[Products], scales: Mapping[str, float]) -> float:
    """Root mean square distance of weights from their mean, ``sqrt(mean_c sum_layers ||s (D_c - D)||^2)``.

    Distances are computed between the small cores of the products in a shared orthonormal basis of the layer,
    or between the dense matrices if that basis would not be smaller.

    Args:
        starts: ``D_c`` of every client by layer, without the scale ``s``.
        scales: ``s`` by layer.
    """
    total = 0.0
    for name, scale in scales.items():
        products = [start[name] for start in starts if name in start]
        if not products:
            continue
        m, n = products[0].shape
        if 2 * sum(product.rank for product in products) < min(m, n):
            ranks = [product.rank for product in products]
            left = torch.linalg.qr(torch.cat([p.B for p in products], dim=1), mode="r").R
            right = torch.linalg.qr(torch.cat([p.A.mT for p in products], dim=1), mode="r").R
            pairs = zip(left.split(ranks, dim=1), right.split(ranks, dim=1), strict=True)
            cores = [L @ R.mT for L, R in pairs]
        else:
            cores = [product.dense() for product in products]
        mean = torch.stack(cores).mean(dim=0)
        total += scale**2 * sum(float((core - mean).square().sum()) for core in cores)
    return math.sqrt(total / max(len(starts), 1))


def norm_and_cosine(
    change: Update, before: Update, scales: Mapping[str, float]
) -> tuple[float, float | None]:
    """``||D^t||`` and ``cos(D^t, D^{t-1})`` of two changes of the global weights; layers are scaled by ``s``.

    The cosine is None if either change is zero.
    """
    square = inner = before_square = 0.0
    for name, scale in scales.items():
        if name in change:
            square += scale**2 * _inner(change[name], change[name])
        if name in before:
            before_square += scale**2 * _inner(before[name], before[name])
        if name in change and name in before:
            inner += scale**2 * _inner(change[name], before[name])
    cosine = inner / math.sqrt(square * before_square) if square > 0 and before_square > 0 else None
    return math.sqrt(max(square, 0.0)), cosine


def effective_rank(matrix: LowRank | Tensor) -> float:
    """``exp(H(sigma / sum sigma))`` with the entropy ``H`` of the singular values (Roy and Vetterli 2007).

    The value is between 1 and the rank, and 0 for a zero matrix.
    """
    matrix = matrix.to(dtype=torch.promote_types(matrix.dtype, torch.float32))  # bfloat16 has no SVD
    if isinstance(matrix, LowRank):
        if matrix.rank >= min(matrix.shape):
            sigma = torch.linalg.svdvals(matrix.dense())
        else:
            left = torch.linalg.qr(matrix.B, mode="r").R
            right = torch.linalg.qr(matrix.A.mT, mode="r").R
            sigma = torch.linalg.svdvals(left @ right.mT)
    else:
        sigma = torch.linalg.svdvals(matrix)
    total = float(sigma.sum())
    if total == 0.0:
        return 0.0
    shares = sigma.double() / total
    shares = shares[shares > 0]
    return float((-(shares * shares.log()).sum()).exp())


def _inner(one: LowRank | Tensor, other: LowRank | Tensor) -> float:
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return one.inner(other)
    dense = [value.dense() if isinstance(value, LowRank) else value for value in (one, other)]
    return float((dense[0] * dense[1]).sum())
