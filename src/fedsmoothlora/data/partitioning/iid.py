"""Deal the rows at random in near equal parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from fedsmoothlora.data.partitioning.base import Partitioning, Rows

if TYPE_CHECKING:
    from fedsmoothlora.data.partitions import Labels, Partition


@dataclass(frozen=True, kw_only=True)
class IID(Partitioning):
    """Deal the rows at random in near equal parts.

    Attributes:
        kind: ``iid``.
        clients: number of clients.
    """

    kind: Literal["iid"] = "iid"
    clients: Annotated[int, Ge(1)]

    def deal(self, rows: Rows, seed: int) -> Partition:
        """See `iid`."""
        return iid(rows.labels, self.clients, seed)


def iid(labels: Labels, clients: int, seed: int) -> Partition:
    """Deal the rows at random in near equal parts.

    A random permutation of the rows is cut into `clients` parts whose sizes differ by at most one.

    Args:
        labels: class of every row, (rows,), integers; only their number matters.
        clients: number of clients, from 1 to the number of rows.
        seed: seed of the permutation, at least 0.

    Raises:
        ConfigError: `labels` is not a 1-D integer array, a parameter is out of range, or there are more
            clients than rows.

    Source: the IID partition of McMahan et al., arXiv:1602.05629, section 3.
    """
    import numpy as np

    from fedsmoothlora.data.arguments import as_integers
    from fedsmoothlora.data.dealing import checked_generator, numbered_clients

    labels = as_integers(labels)
    rng = checked_generator(labels, clients, seed)
    return numbered_clients(np.array_split(rng.permutation(len(labels)), clients))
