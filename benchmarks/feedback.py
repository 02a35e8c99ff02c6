"""Error feedback with the search of a sum, compared with other searches: distances from a known target."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.rows import Row
from fedsmoothlora.algebra.alignment import truncated
from fedsmoothlora.algebra.averaging import exact_mean
from fedsmoothlora.algebra.coding import code_product, unpacked
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.sums import Matrix, dense, remainder, unformed

_M, _N, _RANK, _CLIENTS, _ROUNDS, _BITS = 384, 256, 8, 5, 24, 4

# By title: the singular values of the target.
_SPECTRA = {
    "target with a decaying spectrum": (1.0 + torch.arange(_N)) ** -0.7,
    "target with a flat spectrum": torch.ones(_N),
}
_SEARCHES: dict[str, Callable[[Matrix], LowRank]] = {
    "ours": lambda matrix: truncated(matrix, _RANK, feeds_back=True),
    "two power steps": lambda matrix: truncated(dense(matrix), _RANK, feeds_back=True),
    "full SVD": lambda matrix: LowRank.from_dense(dense(matrix), _RANK),
}


def rows() -> Iterator[Row]:
    """Distances after the last round, relative to the target's norm."""
    for title, sigma in _SPECTRA.items():
        found = {name: _distance(sigma, search) for name, search in _SEARCHES.items()}
        for other in ("two power steps", "full SVD"):
            yield Row(
                name=f"{title}, {_ROUNDS} rounds in {_BITS} bits: distance from it, against {other}",
                value=found["ours"],
                unit="",
                against=found[other],
                target="about 1",
            )


def _distance(sigma: Tensor, search: Callable[[Matrix], LowRank]) -> float:
    """Clients move towards targets of their own around a common one, in updates of rank ``r``."""
    draw = torch.Generator().manual_seed(0)
    target = _drawn(sigma, draw)
    own = [target + 0.03 * _drawn(torch.ones(_N), draw) for _ in range(_CLIENTS)]
    weight = torch.zeros(_M, _N)
    memory: LowRank | Tensor | None = None
    for _ in range(_ROUNDS):
        uploads = [_upload(goal - weight, draw) for goal in own]
        matrix = unformed(exact_mean(uploads, [1.0] * _CLIENTS), memory)
        sent = LowRank.of(unpacked(code_product(matrix, search(matrix), _BITS)))
        memory = remainder(matrix, sent)
        weight = weight + sent.dense()
    return float((weight - target).norm() / target.norm())


def _drawn(sigma: Tensor, draw: torch.Generator) -> Tensor:
    """A random matrix with the given singular values."""
    P, Q = (torch.linalg.qr(torch.randn(rows, _N, generator=draw)).Q for rows in (_M, _N))
    return (P * sigma) @ Q.mT


def _upload(change: Tensor, draw: torch.Generator) -> LowRank:
    """The leading directions of a client's change, with the noise of its batches."""
    size = 0.1 * change.norm() / (_M * _N) ** 0.5
    noisy = change + size * torch.randn(_M, _N, generator=draw)
    return 0.7 * LowRank.from_dense(noisy, _RANK)
