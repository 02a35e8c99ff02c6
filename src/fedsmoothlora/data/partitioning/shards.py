"""Sort the rows by label, cut them into shards, and deal each client the same number of shards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from fedsmoothlora.data.partitioning.base import Partitioning, Rows
from fedsmoothlora.errors import ConfigError

if TYPE_CHECKING:
    from fedsmoothlora.data.partitions import Labels, Partition


@dataclass(frozen=True, kw_only=True)
class Shards(Partitioning):
    """Sort the rows by label, cut them into shards, and deal each client the same number of shards.

    Attributes:
        kind: ``shards``.
        clients: number of clients.
        shards_per_client: shards that each client gets; 2 unless set.
    """

    kind: Literal["shards"] = "shards"
    clients: Annotated[int, Ge(1)]
    shards_per_client: Annotated[int, Ge(1)] | None = None

    def deal(self, rows: Rows, seed: int) -> Partition:
        """See `shards`."""
        return shards(rows.classes_for(self.kind), self.clients, seed, self.shards_per_client or 2)


def shards(labels: Labels, clients: int, seed: int, shards_per_client: int = 2) -> Partition:
    """Sort the rows by label, cut them into shards, and deal each client the same number of shards.

    The clients * shards_per_client shards are contiguous and differ in size by at most one row. A client
    therefore sees few classes: at most two for each of its shards, if no shard is larger than a class. The
    rows of a class are in random order.

    Args:
        labels: class of every row, (rows,), integers.
        clients: number of clients, from 1 to the number of rows.
        seed: seed of the shuffle and of the deal, at least 0.
        shards_per_client: shards each client gets, at least 1.

    Raises:
        ConfigError: `labels` is not a 1-D integer array, a parameter is out of range, there are more clients
            than rows, or more shards than rows.

    Source: the pathological non-IID partition of McMahan et al., arXiv:1602.05629, section 3.
    """
    import numpy as np

    from fedsmoothlora.data.arguments import as_integers, check_whole
    from fedsmoothlora.data.dealing import checked_generator, numbered_clients

    labels = as_integers(labels)
    check_whole("shards_per_client", shards_per_client)
    rng = checked_generator(labels, clients, seed)
    total = clients * shards_per_client
    if total > len(labels):
        raise ConfigError(
            f"shards: {clients} clients with shards_per_client={shards_per_client} need {total} shards, but "
            f"there are only {len(labels)} rows; use fewer clients or fewer shards"
        )
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(by_label, total)
    deal = rng.permutation(total).reshape(clients, shards_per_client)
    return numbered_clients([np.concatenate([pieces[shard] for shard in hand]) for hand in deal])
