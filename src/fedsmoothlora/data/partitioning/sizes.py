"""Deal the rows at random in parts whose sizes follow a power law."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from fedsmoothlora.data.partitioning.base import Partitioning, Rows

if TYPE_CHECKING:
    from fedsmoothlora.data.partitions import Labels, Partition


@dataclass(frozen=True, kw_only=True)
class Sizes(Partitioning):
    """Deal the rows at random in parts whose sizes follow a power law.

    Attributes:
        kind: ``sizes``.
        clients: number of clients.
        power: exponent of the power law; 1 unless set.
        min_size: the fewest rows that a client may get; 1 unless set.
    """

    kind: Literal["sizes"] = "sizes"
    clients: Annotated[int, Ge(1)]
    power: Annotated[float, Gt(0)] | None = None
    min_size: Annotated[int, Ge(1)] | None = None

    def deal(self, rows: Rows, seed: int) -> Partition:
        """See `sizes`."""
        power = 1.0 if self.power is None else self.power
        return sizes(rows.labels, self.clients, seed, power=power, min_size=self.min_size or 1)


def sizes(labels: Labels, clients: int, seed: int, power: float = 1.0, min_size: int = 1) -> Partition:
    """Deal the rows at random in parts whose sizes follow a power law.

    Client i = 0, 1, ... gets a share proportional to (i + 1)^-power of the shuffled rows, so client "0" has
    the most. Clients whose share is below `min_size` get `min_size`, and the other clients share the rest in
    proportion. Shares are rounded by largest remainder, so that sizes sum to the number of rows.

    Args:
        labels: class of every row, (rows,), integers; only their number matters.
        clients: number of clients, from 1 to the number of rows.
        seed: seed of the shuffle, at least 0; the sizes do not depend on it.
        power: exponent of the power law, positive and finite. For equal sizes use `iid`.
        min_size: the fewest rows a client may have, at least 1.

    Raises:
        ConfigError: `labels` is not a 1-D integer array, a parameter is out of range, or there are more
            clients than rows or too few rows for `min_size`.

    Source: quantity skew, Li et al., arXiv:2102.02079, with a power law in place of their Dirichlet draw.
    """
    import numpy as np

    from fedsmoothlora.data.arguments import as_integers, check_positive
    from fedsmoothlora.data.dealing import checked_generator, numbered_clients

    labels = as_integers(labels)
    check_positive("power", power)
    rng = checked_generator(labels, clients, seed, min_size)
    rows = len(labels)
    weights = np.arange(1, clients + 1, dtype=np.float64) ** -float(power)  # (clients,), decreasing
    totals = np.cumsum(weights)
    # If the first `full` clients are above min_size, the last of them has the smallest share.
    left = rows - (clients - np.arange(1, clients + 1)) * min_size  # (clients,), rows for the first 1, 2, ...
    enough = left * (weights / totals) >= min_size
    full = int(np.flatnonzero(enough)[-1]) + 1  # the first client alone always has enough
    shares = left[full - 1] * (weights[:full] / totals[full - 1])
    counts = np.full(clients, min_size, dtype=np.int64)
    counts[:full] = np.floor(shares)
    counts[np.argsort(np.floor(shares) - shares, kind="stable")[: rows - counts.sum()]] += 1
    return numbered_clients(np.split(rng.permutation(rows), np.cumsum(counts)[:-1]))
