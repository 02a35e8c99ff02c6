"""Deal each class in proportions drawn from a symmetric Dirichlet distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from fedsmoothlora.data.partitioning.base import Partitioning, Rows
from fedsmoothlora.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedsmoothlora.data.partitions import Labels, Partition


DIRICHLET_DRAWS = 1_000
"""The largest number of draws with which `dirichlet` tries to reach `min_size`."""

# Above this concentration every proportion is 1 / clients to six digits. Far above it, NumPy's sum of Gamma
# variates overflows, and the proportions become zeros.
_LARGEST_ALPHA = 1e12


@dataclass(frozen=True, kw_only=True)
class Dirichlet(Partitioning):
    """Deal each class in proportions drawn from a symmetric Dirichlet distribution.

    Attributes:
        kind: ``dirichlet``.
        clients: number of clients.
        alpha: concentration of the distribution; 0.1 is very uneven, 10 nearly even.
        min_size: the fewest rows that a client may get; 1 unless set.
    """

    kind: Literal["dirichlet"] = "dirichlet"
    clients: Annotated[int, Ge(1)]
    alpha: Annotated[float, Gt(0)]
    min_size: Annotated[int, Ge(1)] | None = None

    def deal(self, rows: Rows, seed: int) -> Partition:
        """See `dirichlet`."""
        return dirichlet(
            rows.classes_for(self.kind), self.clients, seed, alpha=self.alpha, min_size=self.min_size or 1
        )


def dirichlet(labels: Labels, clients: int, seed: int, alpha: float, min_size: int = 1) -> Partition:
    """Deal each class in proportions drawn from a symmetric Dirichlet distribution.

    For class c with n_c rows, p_c ~ Dir(alpha, ..., alpha) over the clients, and client i gets n_c p_ci of
    the class's shuffled rows, rounded up or down at random such that the expectation is n_c p_ci. All classes
    are redrawn until every client has `min_size` rows, at most `DIRICHLET_DRAWS` times. A large alpha gives
    every client the global label proportions; a small alpha gives each class to few clients.

    Args:
        labels: class of every row, (rows,), integers.
        clients: number of clients, from 1 to the number of rows.
        seed: seed of every draw, at least 0.
        alpha: concentration, positive and finite.
        min_size: the fewest rows a client may have, at least 1.

    Raises:
        ConfigError: `labels` is not a 1-D integer array, a parameter is out of range, there are more clients
            than rows or too few rows for `min_size`, or no draw gave every client `min_size` rows.

    Source: Yurochkin et al., arXiv:1905.12022. Hsu et al., arXiv:1909.06335, draw proportions over classes
    for each client instead, which fixes the clients' sizes. Some published code gives no more rows to a
    client above the mean size. This function does not, because it changes the distribution and can divide 0
    by 0.
    """
    import numpy as np

    from fedsmoothlora.data.arguments import as_integers, check_positive
    from fedsmoothlora.data.dealing import checked_generator, numbered_clients, rows_by_class

    labels = as_integers(labels)
    check_positive("alpha", alpha)
    rng = checked_generator(labels, clients, seed, min_size)
    _, of_class = np.unique(labels, return_inverse=True)
    class_sizes = np.bincount(of_class)  # (classes,)
    concentration = np.full(clients, min(float(alpha), _LARGEST_ALPHA))
    for _ in range(DIRICHLET_DRAWS):
        proportions = rng.dirichlet(concentration, size=len(class_sizes))  # (classes, clients)
        # A random offset for each class makes the rounding fair. Rounding down, as most published code does,
        # moves about half a row per class from the first client to the last.
        start = rng.random((len(class_sizes), 1))
        ends = np.floor(np.cumsum(proportions, axis=1) * class_sizes[:, None] + start).astype(np.int64)
        ends = np.minimum(ends, class_sizes[:, None])
        ends[:, -1] = class_sizes
        counts = np.diff(ends, axis=1, prepend=0)  # (classes, clients)
        if counts.sum(axis=0).min() >= min_size:
            break
    else:
        raise ConfigError(
            f"dirichlet: none of {DIRICHLET_DRAWS} draws with alpha={alpha} gave each of {clients} clients "
            f"min_size={min_size} of the {len(labels)} rows; use a larger alpha, a smaller min_size or "
            "fewer clients"
        )
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
    for held, cuts in zip(rows_by_class(of_class, rng), ends[:, :-1], strict=True):
        for part, piece in zip(parts, np.split(held, cuts), strict=True):
            part.append(piece)
    return numbered_clients([np.concatenate(part) for part in parts])
