"""Draw the clients that take part in a round: so many by the run's seed, or each by itself in secret."""

from __future__ import annotations

import secrets
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


def sample_in_secret(clients: Sequence[str], rate: float, round: int, seed: int | None = None) -> list[str]:
    """Draw each client by itself with probability ``rate`` (Poisson sampling), in order of ``clients``.

    Privacy is amplified only as long as nobody knows who was drawn, so the draws come from the operating
    system's cryptographic generator.

    Args:
        clients: all clients.
        rate: the probability.
        round: ``t``, for draws with a seed.
        seed: a seed for tests, with which the draw is no secret.
    """
    if seed is None:
        system = secrets.SystemRandom()
        return [client for client in clients if system.random() < rate]
    generator = generator_for(seed, "secret participants", round)
    drawn = torch.rand(len(clients), generator=generator, dtype=torch.float64) < rate
    return [client for client, chosen in zip(clients, drawn.tolist(), strict=True) if chosen]
