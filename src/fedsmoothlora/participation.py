"""Which clients take part in a round."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Interval

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.seeds import generator_for


@dataclass(frozen=True, kw_only=True)
class ParticipationSettings:
    """The keys of ``[participation]``. All clients take part in every round unless one of them is set.

    Attributes:
        clients: so many clients a round, drawn by seed.
        fraction: that share of the clients a round, at least one.
    """

    clients: Annotated[int, Ge(1)] | None = None
    fraction: Annotated[float, Gt(0), Interval(le=1)] | None = None

    def count(self, clients: int) -> int:
        """How many of ``clients`` take part in a round."""
        if self.clients is not None:
            return min(self.clients, clients)
        if self.fraction is not None:
            return max(1, round(self.fraction * clients))
        return clients

    def check(self, clients: int, min_clients: int) -> None:
        """Raise ``ConfigError`` if a round with every upload accepted would still have too few of them."""
        count = self.count(clients)
        if min_clients > count:
            raise ConfigError(
                f"uploads.min_clients = {min_clients}, but only {count} of {clients} clients take part in a "
                f"round: no round could ever count; take at most {count}, or more clients a round"
            )


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
