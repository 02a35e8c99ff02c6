"""Robust means: client weights from the distances between uploads, and coordinate-wise means.

The geometric median and Multi-Krum need no dense matrix: both depend on the uploads only through their Gram
matrix ``G_ij = <x_i, x_j>``, which `LowRank.inner` gives exactly from the factors, and their result is a
weighted mean of the uploads. The coordinate-wise means work on dense tensors, one layer at a time.

Sources: geometric median, RFA (arXiv 1912.13445); Multi-Krum (arXiv 1703.02757); trimmed mean and
median (arXiv 1803.01498).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsmoothlora.algebra.averaging import client_weights
from fedsmoothlora.algebra.lowrank import LowRank

# Weiszfeld's iteration: the largest number of steps, and the change of weights at which it ends.
_STEPS, _CLOSE = 1000, 1e-10
# Distances are at least this fraction of the median distance, so that no weight is infinite.
_SMOOTHING = 1e-6


def gram(uploads: Sequence[Mapping[str, LowRank | Tensor]], scales: Mapping[str, float]) -> Tensor:
    """``G_ij = sum_layers s^2 <x_i, x_j>``, ``(C, C)`` in float64.

    Args:
        uploads: one upload per client, all with the same layers.
        scales: the scale ``s`` by layer; 1 for layers that are missing.
    """
    count = len(uploads)
    total = torch.zeros(count, count, dtype=torch.float64)
    for name in uploads[0]:
        values = [_double(upload[name]) for upload in uploads]
        square = scales.get(name, 1.0) ** 2
        for i in range(count):
            for j in range(i, count):
                total[i, j] += square * _inner(values[i], values[j])
    return total.triu() + total.triu(1).mT


def squared_distances(gram: Tensor) -> Tensor:
    """``||x_i - x_j||^2 = G_ii + G_jj - 2 G_ij``, ``(C, C)``."""
    norms = gram.diagonal()
    found = (norms[:, None] + norms[None] - 2 * gram).clamp(min=0)
    return found.fill_diagonal_(0.0)


def geometric_median(gram: Tensor, counts: Sequence[float]) -> list[float]:
    """Client weights whose weighted mean is the geometric median ``argmin_z sum_c n_c ||z - x_c||``.

    Computed by Weiszfeld's iteration ``w_c = n_c / ||z - x_c||``, normalised, with a lower bound on
    distances.

    Args:
        gram: Gram matrix of the uploads, ``(C, C)``.
        counts: the clients' numbers of training samples ``n_c``.
    """
    squares = squared_distances(gram)
    samples = torch.tensor(client_weights(counts), dtype=torch.float64)
    weights = samples.clone()
    least = _SMOOTHING * float(squares.sqrt().median())
    if len(counts) == 1 or least == 0.0:  # a single upload, or most uploads are the same
        least = torch.finfo(torch.float64).tiny
    for _ in range(_STEPS):
        # ||x_c - sum_i w_i x_i||^2 = sum_i w_i d_ci^2 - 1/2 sum_ij w_i w_j d_ij^2
        mixed = squares @ weights
        distances = (mixed - 0.5 * weights @ mixed).clamp(min=0).sqrt()
        if not bool(distances.any()):  # all uploads are the same
            break
        new = samples / distances.clamp(min=least)
        new /= new.sum()
        moved = float((new - weights).abs().max())
        weights = new
        if moved < _CLOSE:
            break
    return [float(weight) for weight in weights]


def multi_krum(gram: Tensor, byzantine: int) -> list[float]:
    """Client weights of Multi-Krum (arXiv 1703.02757): ``1 / (C - f)`` for the best uploads, 0 for ``f``.

    The score of an upload is the sum of its ``C - f - 2`` smallest squared distances to other uploads; the
    smallest scores are best. Numbers of samples are claims of the clients and do not count.

    Args:
        gram: Gram matrix of the uploads, ``(C, C)``.
        byzantine: ``f``, the largest number of malicious clients.

    Raises:
        ValueError: there are fewer than ``2 f + 3`` uploads.
    """
    count = len(gram)
    if count < 2 * byzantine + 3:
        raise ValueError(f"Multi-Krum against {byzantine} clients needs {2 * byzantine + 3}; got {count}")
    others = squared_distances(gram).fill_diagonal_(float("inf")).sort(dim=1).values
    scores = others[:, : count - byzantine - 2].sum(dim=1)
    chosen = set(scores.argsort(stable=True)[: count - byzantine].tolist())
    return client_weights([float(index in chosen) for index in range(count)])


def trimmed_mean(values: Sequence[Tensor], byzantine: int) -> Tensor:
    """The unweighted mean of every coordinate without its ``f`` smallest and ``f`` largest values.

    Args:
        values: tensors of one shape, one per client.
        byzantine: ``f``, the largest number of malicious clients.

    Raises:
        ValueError: there are no more than ``2 f`` tensors.
    """
    count = len(values)
    if count <= 2 * byzantine:
        raise ValueError(f"a mean trimmed by {byzantine} needs more than {2 * byzantine}; got {count}")
    ordered = torch.stack([value.double() for value in values]).sort(dim=0).values
    return ordered[byzantine : count - byzantine].mean(dim=0)


def median(values: Sequence[Tensor]) -> Tensor:
    """The unweighted median of every coordinate; for an even number of values, the mean of the middle two.

    Args:
        values: tensors of one shape, one per client.
    """
    return trimmed_mean(values, (len(values) - 1) // 2)


def capped_weights(counts: Sequence[float], largest: float) -> list[float]:
    """Client weights of at most ``largest``; the excess is shared by the other clients in proportion.

    If none of the others has samples, they share it equally. With fewer than ``1 / largest`` clients there
    are no such weights, and all clients get equal weights.

    Args:
        counts: the clients' numbers of training samples.
        largest: the largest weight, above 0.
    """
    weights = torch.tensor(client_weights(counts), dtype=torch.float64)
    if largest * len(counts) <= 1:
        return [1 / len(counts)] * len(counts)
    capped = torch.zeros(len(counts), dtype=torch.bool)
    while True:
        left = 1 - largest * int(capped.sum())
        free = torch.where(capped, 0.0, weights)
        if not bool(free.any()):
            free = torch.where(capped, 0.0, 1.0).double()
        shares = torch.where(capped, largest, free / free.sum() * left)
        above = shares > largest * (1 + 1e-12)
        if not bool(above.any()):
            return [float(share) for share in shares]
        capped |= above


def _double(value: LowRank | Tensor) -> LowRank | Tensor:
    return value.to(dtype=torch.float64)


def _inner(one: LowRank | Tensor, other: LowRank | Tensor) -> float:
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return one.inner(other)
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    return float(one.flatten() @ other.flatten())
