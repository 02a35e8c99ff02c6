"""The rows of each client: the share for validation, and notes on unusual partitions."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.algebra.seeds import seed_for
from fedsmoothlora.data.partitions import Labels, Partition, label_counts

_NAMED = 5  # classes or clients that a note lists


def split_validation(
    rows: NDArray[np.int64], labels: Labels, share: float, seed: int, client: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keep a share of a client's rows for validation.

    From each class with n >= 2 of the client's rows, share · n rows are kept. These numbers are rounded up or
    down such that their sum is right to the nearest row. The only row of a class is never taken, so all of
    the client's classes remain in its training rows.

    Args:
        rows: the client's rows of the training set, (rows,), distinct.
        labels: class of every row of the training set.
        share: fraction of the rows to keep, from 0 to 0.5.
        seed: the run's seed. The draw depends only on the seed, the client's id and its rows.
        client: the client's id.

    Returns:
        The rows to train on and those to validate with, each sorted.

    Raises:
        ValueError: ``share`` is out of range.
    """
    if not 0 <= share <= 0.5:
        raise ValueError(f"share = {share} must be from 0 to 0.5")
    rows = np.sort(rows)
    rng = np.random.default_rng(seed_for(seed, "validation", client))
    found, counts = np.unique(labels[rows], return_counts=True)
    found, counts = found[counts >= 2], counts[counts >= 2]
    quotas = share * counts  # (classes with two rows or more,)
    taken = np.floor(quotas).astype(np.int64)
    more = floor(float(quotas.sum()) + 0.5) - int(taken.sum())
    order = rng.permutation(len(found))  # breaks ties at random
    taken[order[np.argsort(-(quotas - taken)[order], kind="stable")[:more]]] += 1
    drawn = [
        rng.permutation(rows[labels[rows] == label])[:number]
        for label, number in zip(found, taken, strict=True)
    ]
    validation = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *drawn]))
    return np.setdiff1d(rows, validation), validation


def partition_notes(partition: Partition, labels: Labels, classes: Sequence[str]) -> list[str]:
    """Notes on clients without rows, and on classes that only one client or no client has.

    Args:
        partition: which client has which rows.
        labels: class of every row, (rows,).
        classes: the classes' names.
    """
    counts = label_counts(partition, labels, len(classes))  # (clients, classes)
    clients = list(partition.clients)
    notes = []
    empty = [repr(client) for client, sizes in zip(clients, counts, strict=True) if not sizes.any()]
    if empty:
        notes.append(f"{len(empty)} of {len(clients)} clients have no rows: {_some(empty)}")
    holders = (counts > 0).sum(axis=0)  # (classes,)
    nowhere = [repr(name) for name, number in zip(classes, holders, strict=True) if number == 0]
    if nowhere:
        notes.append(f"{len(nowhere)} of {len(classes)} classes have rows at no client: {_some(nowhere)}")
    if len(clients) > 1 and (holders == 1).any():
        alone = [
            f"{classes[int(label)]!r} ({counts[client, label]} rows, client {clients[int(client)]!r})"
            for label in np.flatnonzero(holders == 1)
            for client in np.flatnonzero(counts[:, label])
        ]
        notes.append(f"{len(alone)} of {len(classes)} classes have rows at one client only: {_some(alone)}")
    if len(partition.left_out):
        notes.append(f"{len(partition.left_out)} of {len(labels)} rows belong to no client")
    return notes


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
