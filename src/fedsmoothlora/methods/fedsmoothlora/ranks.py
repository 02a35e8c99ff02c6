"""The ranks at which layers travel: fixed, or by the energy of their directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedsmoothlora.algebra.update import Layer, Update
from fedsmoothlora.methods.base import ClientView, ServerView
from fedsmoothlora.methods.fedsmoothlora.subspace import feedback_key

if TYPE_CHECKING:
    from torch import Tensor

    from fedsmoothlora.algebra.lowrank import LowRank
    from fedsmoothlora.methods.fedsmoothlora.method import FedSmoothLoRA


def upload_ranks(
    method: FedSmoothLoRA, changes: Mapping[str, LowRank | Tensor], client: ClientView
) -> Mapping[str, int]:
    """The rank at which each layer's change is sent."""
    fixed = {name: layer.rank for name, layer in client.layers.items()}
    if method.layer_ranks == "fixed":
        return fixed
    from fedsmoothlora.algebra.sums import plus

    sums = {name: plus(changes[name], client.kept.get(feedback_key(name))) for name in client.layers}
    return shared_out(sums.__getitem__, client.layers, fixed, client.nbytes)


def server_ranks(
    method: FedSmoothLoRA, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
) -> Mapping[str, int]:
    """The rank of each layer's ``S^t``."""
    share = method.server_share
    fixed = method.server_rank if isinstance(method.server_rank, int) else method.server_rank_cap
    ranks = {name: fixed or layer.rank for name, layer in server.layers.items()}
    if share is None and method.layer_ranks == "fixed":
        return ranks
    from fedsmoothlora.algebra.alignment import squared_norm
    from fedsmoothlora.algebra.averaging import exact_mean, products_of
    from fedsmoothlora.algebra.ranks import leading_singular_values, rank_for_share
    from fedsmoothlora.algebra.sums import plus

    def matrix(name: str) -> LowRank | Tensor:
        """``avg + E^t``."""
        return plus(exact_mean(products_of(uploads, name), weights), server.memory.get(name))

    if share is None:
        return shared_out(matrix, server.layers, ranks, server.nbytes)
    for name, most in ranks.items():
        whole = matrix(name)
        energies = leading_singular_values(whole, most).square()
        ranks[name] = max(1, rank_for_share(energies, share, squared_norm(whole)))
    return ranks


def shared_out(
    matrix: Callable[[str], LowRank | Tensor],
    layers: Mapping[str, Layer],
    fixed: Mapping[str, int],
    nbytes: Callable[[Layer, int], int],
) -> dict[str, int]:
    """Ranks with the most energy ``(s sigma)^2`` per byte, within the bytes of the ranks in ``fixed``."""
    from fedsmoothlora.algebra.ranks import allocated_ranks, leading_singular_values

    energies = {
        name: (layer.scale * leading_singular_values(matrix(name), highest_rank(layer, fixed[name]))).square()
        for name, layer in layers.items()
    }
    budget = sum(nbytes(layer, fixed[name]) for name, layer in layers.items())
    return allocated_ranks(energies, lambda name, rank: nbytes(layers[name], rank), budget)


def highest_rank(layer: Layer, fixed: int) -> int:
    """The highest rank with ``layer_ranks = "energy"`` of a layer that otherwise has the rank ``fixed``."""
    return min(2 * fixed, layer.m, layer.n)
