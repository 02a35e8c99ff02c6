"""The method's formulas on dense matrices: full SVDs, weight gradients by autograd. Slow and plain.

What the package computes in factors and from hooks must agree with this; tests use it as their oracle,
`make bench` as what costs are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """``SVD_r`` of a dense ``(m, n)`` matrix, as a dense matrix."""
    P, sigma, Qt = torch.linalg.svd(matrix, full_matrices=False)
    return (P[:, :rank] * sigma[:rank]) @ Qt[:rank]


def gradient_aligned(gradient: Tensor, rank: int, gamma: float) -> Tensor:
    """Step 3: ``sqrt(m)/gamma P[:, r:2r] Q[:, :r]^T`` with the largest entry of every column positive."""
    P, _, Qt = torch.linalg.svd(gradient, full_matrices=False)
    left, right = P[:, rank : 2 * rank], Qt[:rank].mT
    for vectors in (left, right):
        for column in vectors.mT:
            if column[column.abs().argmax()] < 0:
                column.neg_()
    return math.sqrt(gradient.shape[0]) / gamma * left @ right.mT


def round_match(upload: Tensor, server_updates: Sequence[Tensor], zeta: float, staleness: float) -> Tensor:
    """Step 1: ``zeta rho^(k - 1) (U_c - sum of the k updates since)``."""
    return zeta * staleness ** (len(server_updates) - 1) * (upload - sum(server_updates))


def start(ga: Tensor, match: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Step 4, truncated: the LoRA's product ``SVD_r(GA + R)`` and the backbone's shift ``-GA``."""
    return truncated(ga + match, rank), -ga


def upload(B: Tensor, A: Tensor, shift: Tensor, rank: int) -> Tensor:
    """Step 6: ``SVD_r(B A + shift)``."""
    return truncated(B @ A + shift, rank)


def average(factors: Sequence[tuple[Tensor, Tensor]], samples: Sequence[int], rank: int) -> Tensor:
    """The server's ``S^t = SVD_r(sum_c p_c B_c A_c)``."""
    total = sum(samples)
    return truncated(sum(n / total * B @ A for (B, A), n in zip(factors, samples, strict=True)), rank)


def gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Tensor],
    loss: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """Step 2: autograd's own gradients of the weights, ``(m, n)``, mean over batches."""
    model.eval()
    model.requires_grad_(False)
    weights = [module.weight.requires_grad_(True) for module in modules.values()]
    totals = [torch.zeros_like(weight) for weight in weights]
    count = 0
    for batch in batches:
        count += 1
        for total, gradient in zip(totals, torch.autograd.grad(loss(batch), weights), strict=True):
            total += gradient
    for weight in weights:
        weight.requires_grad_(False)
    return {
        name: (total.mT if isinstance(module, Conv1D) else total) / count
        for (name, module), total in zip(modules.items(), totals, strict=True)
    }
