"""The assignment of a training set's rows to clients; `data/partitioning/` computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.arguments import as_integers, check_whole
from fedsmoothlora.errors import ConfigError

Labels = NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Partition:
    """The rows of a training set by client.

    Every row belongs to exactly one client or is in `left_out`; see `check`.

    Attributes:
        clients: each client's row indices, (rows of the client,), sorted, by client id in the clients' order.
        left_out: indices of the rows that no client has, (rows left out,), sorted. Only `pathological` leaves
            rows out, of classes that no client has drawn.
    """

    clients: dict[str, NDArray[np.int64]]
    left_out: NDArray[np.int64]


def check(partition: Partition, rows: int) -> None:
    """Check that a partition is disjoint and complete: clients and `left_out` are exactly rows 0 .. rows - 1.

    Args:
        partition: the partition.
        rows: number of rows of the training set.

    Raises:
        ConfigError: `rows` is negative; indices are not a sorted 1-D int64 array; an index is outside the
            training set; a row is assigned twice, or not at all. The message names the client and the row.
    """
    check_whole("rows", rows, least=0)
    holders = [(f"client {client!r}", held) for client, held in partition.clients.items()]
    owner = np.full(rows, -1, dtype=np.int64)  # (rows,), position in `holders`
    for position, (name, held) in enumerate([*holders, ("left_out", partition.left_out)]):
        if held.ndim != 1 or held.dtype != np.int64:
            raise ConfigError(
                f"{name}: row indices must be a 1-D int64 array, not {held.ndim}-D of {held.dtype}"
            )
        if held.size and not 0 <= held.min() <= held.max() < rows:
            wrong = held[(held < 0) | (held >= rows)][0]
            raise ConfigError(f"{name}: row {wrong} is outside the training set's rows 0 to {rows - 1}")
        steps = np.diff(held)
        if (steps == 0).any():
            raise ConfigError(f"{name}: row {held[:-1][steps == 0][0]} is listed twice")
        if (steps < 0).any():
            raise ConfigError(
                f"{name}: row indices must be sorted, but {held[:-1][steps < 0][0]} is before a smaller one"
            )
        shared = held[owner[held] >= 0]
        if shared.size:
            other = holders[owner[shared[0]]][0]
            raise ConfigError(f"row {shared[0]} is assigned twice: to {other} and to {name}")
        owner[held] = position
    lost = np.flatnonzero(owner < 0)
    if lost.size:
        raise ConfigError(
            f"{lost.size} of {rows} rows belong to no client and are not in left_out; first: {lost[0]}"
        )


def label_counts(partition: Partition, labels: Labels, classes: int) -> NDArray[np.int64]:
    """Count each client's rows by class: counts[i, c] = #{row of client i : label = c}.

    Args:
        partition: the rows of each client; rows left out are not counted.
        labels: class of every row, (rows,), integers from 0 to classes - 1.
        classes: number of classes, at least 1.

    Returns:
        Numbers of rows, (clients, classes), in client order.

    Raises:
        ConfigError: `labels` is not a 1-D integer array or has a label outside 0 .. classes - 1, `classes` is
            below 1, or the partition is not a partition of these rows.
    """
    labels = as_integers(labels)
    check_whole("classes", classes)
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        raise ConfigError(
            f"labels: row {outside[0]} has label {labels[outside[0]]}; with classes={classes} "
            f"labels run from 0 to {classes - 1}"
        )
    check(partition, len(labels))
    counts = [np.bincount(labels[held], minlength=classes) for held in partition.clients.values()]
    return np.array(counts, dtype=np.int64).reshape(-1, classes)
