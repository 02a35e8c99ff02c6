"""Draw the clients that take part in a round, and how fast they are.

So many clients are drawn by the run's seed, or each by itself in secret.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Collection, Mapping, Sequence

import torch

from fedsmoothlora.algebra.seeds import generator_for
from fedsmoothlora.federation.settings import lognormal_sigma


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


def client_speeds(
    speeds: str | Sequence[float] | Mapping[str, float] | None, clients: Sequence[str], seed: int
) -> dict[str, float]:
    """The speed of every client, in optimiser steps per unit of simulated time.

    Draws depend on the seed and the client's id only.

    Args:
        speeds: ``participation.speeds``, which was checked.
        clients: the ids of all clients.
        seed: the run's seed.
    """
    if isinstance(speeds, Mapping):
        return {client: float(speeds[client]) for client in clients}
    if speeds is not None and not isinstance(speeds, str):
        return dict(zip(clients, map(float, speeds), strict=True))
    return {client: _speed(speeds or "equal", generator_for(seed, "speed", client)) for client in clients}


def _speed(rule: str, generator: torch.Generator) -> float:
    if rule == "uniform":
        return 0.5 + float(torch.rand((), generator=generator, dtype=torch.float64))
    sigma = lognormal_sigma(rule)
    if sigma is None:  # equal
        return 1.0
    return math.exp(sigma * float(torch.randn((), generator=generator, dtype=torch.float64)))
