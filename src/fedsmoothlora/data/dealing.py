"""Steps that several partitions share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.arguments import check_whole
from fedsmoothlora.data.partitions import Labels, Partition
from fedsmoothlora.errors import ConfigError, DataError


def numbered_clients(
    parts: Sequence[NDArray[np.int64]], left_out: NDArray[np.int64] | None = None
) -> Partition:
    """Name the parts "0", "1", ... and sort their rows."""
    clients = {str(client): np.sort(rows).astype(np.int64) for client, rows in enumerate(parts)}
    return Partition(clients, np.sort(np.empty(0, dtype=np.int64) if left_out is None else left_out))


def named_clients(where: str, held: dict[str, list[int]]) -> Partition:
    """Make a partition among named clients.

    Args:
        where: the partition's name, for the error message.
        held: the rows of each client, in order.
    """
    if not held:
        raise DataError(f"{where}: there are no rows to split among clients")
    clients = {client: np.array(rows, dtype=np.int64) for client, rows in held.items()}
    return Partition(clients, np.empty(0, dtype=np.int64))


def rows_by_class(of_class: NDArray[np.int64], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Each class's rows in random order."""
    shuffled = rng.permutation(len(of_class))
    order = shuffled[np.argsort(of_class[shuffled], kind="stable")]
    return np.split(order, np.cumsum(np.bincount(of_class))[:-1])


def checked_generator(labels: Labels, clients: int, seed: int, min_size: int = 1) -> np.random.Generator:
    """Check the arguments that all random partitions share, and return the random generator."""
    check_whole("clients", clients)
    check_whole("seed", seed, least=0)
    check_whole("min_size", min_size)
    rows = len(labels)
    if clients > rows:
        raise ConfigError(f"{clients} clients cannot share {rows} rows; use at most as many clients as rows")
    if clients * min_size > rows:
        raise ConfigError(
            f"{clients} clients with min_size={min_size} need {clients * min_size} rows, "
            f"but there are {rows}; use a min_size of at most {rows // clients}, or fewer clients"
        )
    return np.random.default_rng(int(seed))


def names_no_client(where: str, row: int, value: object) -> DataError:
    """The error for a row whose value cannot be a client's id."""
    return DataError(
        f"{where}: row index {row} (row number {row + 1}) has {value!r}, which names no client; "
        "every row needs a non-empty string"
    )
