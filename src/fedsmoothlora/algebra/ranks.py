"""How many singular directions of each layer to send: by a share of energy, or by a budget of bytes.

The energy of a direction is its squared singular value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedsmoothlora.algebra.alignment import truncated
from fedsmoothlora.algebra.lowrank import LowRank


def leading_singular_values(matrix: LowRank | Tensor, count: int) -> Tensor:
    """The ``count`` largest singular values in falling order, float64; fewer if the matrix has fewer.

    Of a dense matrix whose spectrum is flat they are approximate (`truncated` with ``feeds_back``).
    """
    found = truncated(matrix, count, "left", feeds_back=True)
    return torch.linalg.vector_norm(found.B.double(), dim=0)


def rank_for_share(energies: Tensor, share: float, total: float | None = None) -> int:
    """The smallest ``k`` with ``sum_{i < k} energies_i >= share * total``; 0 if there is no energy.

    Args:
        energies: energies in falling order.
        share: above 0 and at most 1.
        total: the energy of all directions; the sum of ``energies`` unless given. If those given hold less
            than the share of it, all of them are taken.
    """
    held = energies.cumsum(0)
    if not len(held) or not float(held[-1]):
        return 0
    wanted = share * (float(held[-1]) if total is None else total)
    return min(int((held < wanted).sum()) + 1, len(held))


def allocated_ranks(
    energies: Mapping[str, Tensor], nbytes: Callable[[str, int], int], budget: int
) -> dict[str, int]:
    """Ranks of layers that send the most energy per byte (water-filling over layers).

    Directions of all layers are taken in the order of their energy per byte, ``sigma^2 / bytes``, while
    their bytes fit into the budget. Of equal ones the earlier direction of its layer goes first, so that
    layers of the same shape and spectrum get the same rank. A layer's first direction that does not fit ends
    that layer; the others go on. If all directions have the same bytes, no choice of ranks within the budget
    has more energy. In general none has more than this choice and the first direction that did not fit.

    Args:
        energies: by layer, the energies of its leading directions, in falling order. Directions without
            energy are never taken.
        nbytes: bytes of a layer at a rank, rising with the rank.
        budget: the most bytes of all layers together.
    """
    places = {name: place for place, name in enumerate(energies)}
    order = sorted(
        (-energy / (nbytes(name, k + 1) - nbytes(name, k)), k, places[name], name)
        for name, values in energies.items()
        for k, energy in enumerate(values.tolist())
        if energy > 0
    )
    ranks = dict.fromkeys(energies, 0)
    left = budget - sum(nbytes(name, 0) for name in energies)
    for _, k, _, name in order:
        cost = nbytes(name, k + 1) - nbytes(name, k)
        if ranks[name] == k and cost <= left:
            ranks[name] += 1
            left -= cost
    return ranks
