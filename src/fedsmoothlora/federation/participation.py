"""Which clients take part in a round."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from fedsmoothlora.algebra.seeds import generator_for


def sample_clients(
    clients: Sequence[str], count: int, seed: int, round: int, attempt: int, asked: Collection[str] = ()
) -> list[str]:
    """``count`` clients drawn without replacement from (seed, round, attempt), in the order of ``clients``.

    Clients in ``asked``, from earlier attempts of the round, are not asked again; fewer are returned where
    fewer are left.
    """
    left = [client for client in clients if client not in asked]
    if count >= len(left):
        return left
    generator = generator_for(seed, "participants", round, attempt)
    chosen = torch.randperm(len(left), generator=generator)[:count].sort().values
    return [left[index] for index in chosen.tolist()]
