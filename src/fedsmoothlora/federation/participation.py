"""Draw the clients that take part in a round."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from fedsmoothlora.algebra.seeds import generator_for


def sample_clients(
    clients: Sequence[str], count: int, seed: int, round: int, attempt: int, asked: Collection[str] = ()
) -> list[str]:
    """Draw ``count`` clients without replacement, seeded by seed, round and attempt, in order of ``clients``.

    Clients in ``asked``, from earlier attempts of the round, are not drawn again. If fewer than ``count``
    others are left, all of them are returned.
    """
    left = [client for client in clients if client not in asked]
    if count >= len(left):
        return left
    generator = generator_for(seed, "participants", round, attempt)
    chosen = torch.randperm(len(left), generator=generator)[:count].sort().values
    return [left[index] for index in chosen.tolist()]
