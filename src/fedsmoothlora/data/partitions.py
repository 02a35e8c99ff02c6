"""Which client gets which rows: splitting a training set's rows among clients.

Each kind of partition is one function whose parameters are its options, and all return a `Partition` of row
indices. `PARTITIONS` finds them by name. Whatever is random follows from `seed` alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.errors import ConfigError, DataError

Labels = NDArray[np.integer[Any]]

DIRICHLET_DRAWS = 1_000
"""How often `dirichlet` draws before it gives up on `min_size`."""

# Above this concentration every proportion is 1 / clients to six digits, and far above it numpy's sum of
# Gamma variates overflows and the proportions come back as zeros.
_LARGEST_ALPHA = 1e12


@dataclass(frozen=True, eq=False)
class Partition:
    """The rows of a training set, dealt to clients.

    Every row is in exactly one place: with one client, or in `left_out`. `check` tells whether that holds.

    Attributes:
        clients: client id to its row indices, (rows of the client,), sorted, in client order.
        left_out: indices of the rows that no client got, (rows left out,), sorted. Empty for every kind but
            `pathological`, where a class may be drawn by nobody.
    """

    clients: dict[str, NDArray[np.int64]]
    left_out: NDArray[np.int64]


def check(partition: Partition, rows: int) -> None:
    """Check that a partition is disjoint and complete: clients and `left_out` are exactly rows 0 .. rows - 1.

    Args:
        partition: what to check.
        rows: how many rows the training set has.

    Raises:
        ValueError: `rows` is negative; indices are not a sorted 1-D int64 array; an index is outside the
            training set; a row is in two places, or in none. The message names the client and the row.
    """
    _whole("rows", rows, least=0)
    holders = [(f"client {client!r}", held) for client, held in partition.clients.items()]
    owner = np.full(rows, -1, dtype=np.int64)  # (rows,), position in `holders`
    for position, (name, held) in enumerate([*holders, ("left_out", partition.left_out)]):
        if held.ndim != 1 or held.dtype != np.int64:
            raise ValueError(
                f"{name}: row indices must be a 1-D int64 array, not {held.ndim}-D of {held.dtype}"
            )
        if held.size and not 0 <= held.min() <= held.max() < rows:
            wrong = held[(held < 0) | (held >= rows)][0]
            raise ValueError(f"{name}: row {wrong} is outside the training set's rows 0 to {rows - 1}")
        steps = np.diff(held)
        if (steps == 0).any():
            raise ValueError(f"{name}: row {held[:-1][steps == 0][0]} is listed twice")
        if (steps < 0).any():
            raise ValueError(
                f"{name}: row indices must be sorted, but {held[:-1][steps < 0][0]} comes too early"
            )
        shared = held[owner[held] >= 0]
        if shared.size:
            other = holders[owner[shared[0]]][0]
            raise ValueError(f"row {shared[0]} is in two places: {other} and {name}")
        owner[held] = position
    lost = np.flatnonzero(owner < 0)
    if lost.size:
        raise ValueError(
            f"{lost.size} of {rows} rows are with no client and not in left_out; first: {lost[0]}"
        )


def label_counts(partition: Partition, labels: Labels, classes: int) -> NDArray[np.int64]:
    """Count each client's rows by class: counts[i, c] = #{row of client i : label = c}.

    Args:
        partition: which client has which rows; rows left out are not counted.
        labels: class of every row, (rows,), integers from 0 to classes - 1.
        classes: how many classes there are, at least 1.

    Returns:
        Numbers of rows, (clients, classes), in client order.

    Raises:
        ValueError: `labels` is not a 1-D integer array or has a label outside 0 .. classes - 1, `classes` is
            below 1, or the partition is not one of these rows.
    """
    labels = _integers(labels)
    _whole("classes", classes)
    outside = np.flatnonzero((labels < 0) | (labels >= classes))
    if outside.size:
        raise ValueError(
            f"labels: row {outside[0]} has label {labels[outside[0]]}; with classes={classes} "
            f"labels run from 0 to {classes - 1}"
        )
    check(partition, len(labels))
    counts = [np.bincount(labels[held], minlength=classes) for held in partition.clients.values()]
    return np.array(counts, dtype=np.int64).reshape(-1, classes)


def iid(labels: Labels, clients: int, seed: int) -> Partition:
    """Deal the rows at random in near equal parts.

    A random permutation of the rows is cut into `clients` parts whose sizes differ by at most one.

    Args:
        labels: class of every row, (rows,), integers; only their number matters.
        clients: number of clients, from 1 to the number of rows.
        seed: seed of the permutation, at least 0.

    Raises:
        DataError: `labels` is not a 1-D integer array.
        ConfigError: a parameter is out of range, or there are more
            clients than rows.

    Source: the IID partition of McMahan et al., arXiv:1602.05629, section 3.
    """
    labels = _integers(labels)
    rng = _start(labels, clients, seed)
    return _numbered(np.array_split(rng.permutation(len(labels)), clients))


def dirichlet(labels: Labels, clients: int, seed: int, alpha: float, min_size: int = 1) -> Partition:
    """Deal each class in proportions drawn from a symmetric Dirichlet distribution.

    For class c with n_c rows, p_c ~ Dir(alpha, ..., alpha) over the clients, and client i gets n_c p_ci of
    the class's shuffled rows, rounded up or down at random so that n_c p_ci is its expectation. All classes
    are redrawn until every client has `min_size` rows, at most `DIRICHLET_DRAWS` times. A large alpha gives
    every client the global label proportions; a small one gives each class to few clients.

    Args:
        labels: class of every row, (rows,), integers.
        clients: number of clients, from 1 to the number of rows.
        seed: seed of every draw, at least 0.
        alpha: concentration, positive and finite.
        min_size: the fewest rows a client may have, at least 1.

    Raises:
        DataError: `labels` is not a 1-D integer array.
        ConfigError: a parameter is out of range, there are more clients
            than rows or too few rows for `min_size`, or no draw gave every client `min_size` rows.

    Source: Yurochkin et al., arXiv:1905.12022. Hsu et al., arXiv:1909.06335, draw proportions over classes
    for each client instead, which fixes the clients' sizes. The step of some published code that gives no
    more to a client past the mean size is not taken: it changes the distribution, and can divide 0 by 0.
    """
    labels = _integers(labels)
    _positive("alpha", alpha)
    rng = _start(labels, clients, seed, min_size)
    _, of_class = np.unique(labels, return_inverse=True)
    class_sizes = np.bincount(of_class)  # (classes,)
    concentration = np.full(clients, min(float(alpha), _LARGEST_ALPHA))
    for _ in range(DIRICHLET_DRAWS):
        proportions = rng.dirichlet(concentration, size=len(class_sizes))  # (classes, clients)
        # A random start for each class makes the rounding fair. Cutting off, as most published code does,
        # moves about half a row a class from the first client to the last.
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
            f"min_size={min_size} of the {len(labels)} rows; take a larger alpha, a smaller min_size or "
            "fewer clients"
        )
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
    for held, cuts in zip(_rows_by_class(of_class, rng), ends[:, :-1], strict=True):
        for part, piece in zip(parts, np.split(held, cuts), strict=True):
            part.append(piece)
    return _numbered([np.concatenate(part) for part in parts])


def shards(labels: Labels, clients: int, seed: int, shards_per_client: int = 2) -> Partition:
    """Sort the rows by label, cut them into shards, and deal each client the same number of shards.

    The clients * shards_per_client shards are contiguous and differ in size by at most one row, so a client
    sees few classes: with shards no larger than a class, at most two for each of its shards. The rows of a
    class are in random order.

    Args:
        labels: class of every row, (rows,), integers.
        clients: number of clients, from 1 to the number of rows.
        seed: seed of the shuffle and of the deal, at least 0.
        shards_per_client: shards each client gets, at least 1.

    Raises:
        DataError: `labels` is not a 1-D integer array.
        ConfigError: a parameter is out of range, there are more clients
            than rows, or more shards than rows.

    Source: the pathological non-IID partition of McMahan et al., arXiv:1602.05629, section 3.
    """
    labels = _integers(labels)
    _whole("shards_per_client", shards_per_client)
    rng = _start(labels, clients, seed)
    total = clients * shards_per_client
    if total > len(labels):
        raise ConfigError(
            f"shards: {clients} clients with shards_per_client={shards_per_client} need {total} shards, but "
            f"there are only {len(labels)} rows; take fewer clients or fewer shards"
        )
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(by_label, total)
    deal = rng.permutation(total).reshape(clients, shards_per_client)
    return _numbered([np.concatenate([pieces[shard] for shard in hand]) for hand in deal])


def pathological(labels: Labels, clients: int, seed: int, classes_per_client: int) -> Partition:
    """Give each client exactly `classes_per_client` classes, and split each class among its holders.

    Classes are drawn in passes, each a random order of all classes, so no class has two holders more than
    another, unless that one has no row left to give to one more holder. A class's shuffled rows are split
    among its holders in parts that differ by at most one row. With clients * classes_per_client below the
    number of classes, the rows of the classes nobody drew are left out.

    Args:
        labels: class of every row, (rows,), integers.
        clients: number of clients, from 1 to the number of rows.
        seed: seed of every draw, at least 0.
        classes_per_client: distinct classes each client sees, from 1 to the number of classes in `labels`.

    Raises:
        DataError: `labels` is not a 1-D integer array.
        ConfigError: a parameter is out of range, there are more clients
            than rows, or the classes have too few rows for every client to see that many.

    Source: the quantity-based label imbalance (#C = k) of Li et al., arXiv:2102.02079, with balanced draws.
    """
    labels = _integers(labels)
    _whole("classes_per_client", classes_per_client)
    rng = _start(labels, clients, seed)
    _, of_class = np.unique(labels, return_inverse=True)
    class_sizes = np.bincount(of_class)  # (classes,)
    classes = len(class_sizes)
    if classes_per_client > classes:
        raise ConfigError(
            f"pathological: classes_per_client={classes_per_client}, but the labels have only {classes} "
            f"classes; take at most {classes}"
        )
    most = np.minimum(class_sizes, clients)  # (classes,): each holder needs a row and holds a class once
    draws = clients * classes_per_client
    if most.sum() < draws:
        raise ConfigError(
            f"pathological: {clients} clients with classes_per_client={classes_per_client} need {draws} "
            f"places, but the {classes} classes have rows for only {most.sum()}; take fewer clients or fewer "
            "classes per client"
        )
    places = np.zeros(classes, dtype=np.int64)  # (classes,), how many clients will hold each class
    while (undealt := draws - int(places.sum())) > 0:
        places[rng.permutation(np.flatnonzero(places < most))[:undealt]] += 1

    # Taking the classes with most places to fill never gets stuck (Gale and Ryser): with m clients to go,
    # m * classes_per_client places are open, at most m a class.
    holders: list[list[int]] = [[] for _ in range(classes)]
    for client in rng.permutation(clients):
        order = rng.permutation(classes)  # ties fall at random
        drawn = order[np.argsort(-places[order], kind="stable")[:classes_per_client]]
        places[drawn] -= 1
        for of in drawn:
            holders[of].append(int(client))

    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
    left_out = [np.empty(0, dtype=np.int64)]
    for held, clients_of_class in zip(_rows_by_class(of_class, rng), holders, strict=True):
        if not clients_of_class:
            left_out.append(held)
            continue
        # The first parts are a row larger, so who comes first is random too.
        first_to_last = rng.permutation(clients_of_class)
        for client, piece in zip(first_to_last, np.array_split(held, len(first_to_last)), strict=True):
            parts[client].append(piece)
    return _numbered([np.concatenate(part) for part in parts], np.concatenate(left_out))


def by_column(values: Iterable[str | None], column: str = "") -> Partition:
    """Make one client of each distinct value of a column: the natural federation of users, sites, devices.

    Args:
        values: the column's value for every row, (rows,). The value is the client's id, taken as it is;
            clients come in the order of their first rows.
        column: the column's name, for error messages only.

    Raises:
        DataError: there are no rows, or a value is missing, empty, blank or not a string; the message names
            the row.
    """
    where = f"by_column: column {column!r}" if column else "by_column"
    held: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise _names_no_client(where, row, value)
        held.setdefault(str(value), []).append(row)
    return _natural(where, held)


def by_file(files: Iterable[str | PurePath]) -> Partition:
    """Make one client of each file that rows were read from.

    Args:
        files: the file each row came from, (rows,). The file's name without folder and last suffix is the
            client's id; of several files with the same one, those after the first get "-2", "-3", ... behind
            it. Clients come in the order of their first rows.

    Raises:
        DataError: there are no rows, or a file name is missing, empty or blank; the message names the row.
    """
    held: dict[PurePath, list[int]] = {}
    for row, file in enumerate(files):
        if not isinstance(file, str | PurePath) or not PurePath(file).stem.strip():
            raise _names_no_client("by_file", row, file)
        held.setdefault(PurePath(file), []).append(row)
    # A numbered id must not be another file's stem: "a.txt", "b/a.txt", "a-2.txt".
    taken = {path.stem for path in held}
    ids: dict[str, list[int]] = {}
    for path, rows in held.items():
        client, number = path.stem, 1
        if client in ids:
            while client in taken:
                number += 1
                client = f"{path.stem}-{number}"
            taken.add(client)
        ids[client] = rows
    return _natural("by_file", ids)


def sizes(labels: Labels, clients: int, seed: int, power: float = 1.0, min_size: int = 1) -> Partition:
    """Deal the rows at random in parts whose sizes follow a power law.

    Client i = 0, 1, ... gets a share proportional to (i + 1)^-power of the shuffled rows, so client "0" is
    the largest. Clients whose share is below `min_size` get `min_size`, and the rest is shared in proportion
    by the others; shares are rounded by largest remainder, so sizes sum to the number of rows.

    Args:
        labels: class of every row, (rows,), integers; only their number matters.
        clients: number of clients, from 1 to the number of rows.
        seed: seed of the shuffle, at least 0; the sizes do not depend on it.
        power: exponent of the power law, positive and finite. For equal sizes take `iid`.
        min_size: the fewest rows a client may have, at least 1.

    Raises:
        DataError: `labels` is not a 1-D integer array.
        ConfigError: a parameter is out of range, or there are more
            clients than rows or too few rows for `min_size`.

    Source: quantity skew, Li et al., arXiv:2102.02079, with a power law in place of their Dirichlet draw.
    """
    labels = _integers(labels)
    _positive("power", power)
    rng = _start(labels, clients, seed, min_size)
    rows = len(labels)
    weights = np.arange(1, clients + 1, dtype=np.float64) ** -float(power)  # (clients,), decreasing
    totals = np.cumsum(weights)
    # With the first `full` clients above min_size, the last of them has the smallest share.
    left = rows - (clients - np.arange(1, clients + 1)) * min_size  # (clients,), rows for the first 1, 2, ...
    enough = left * (weights / totals) >= min_size
    full = int(np.flatnonzero(enough)[-1]) + 1  # the first client alone always has enough
    shares = left[full - 1] * (weights[:full] / totals[full - 1])
    counts = np.full(clients, min_size, dtype=np.int64)
    counts[:full] = np.floor(shares)
    counts[np.argsort(np.floor(shares) - shares, kind="stable")[: rows - counts.sum()]] += 1
    return _numbered(np.split(rng.permutation(rows), np.cumsum(counts)[:-1]))


PARTITIONS: dict[str, Callable[..., Partition]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "pathological": pathological,
    "by_column": by_column,
    "by_file": by_file,
    "sizes": sizes,
}
"""Every kind of partition, by the name that configurations use."""


def _numbered(parts: Sequence[NDArray[np.int64]], left_out: NDArray[np.int64] | None = None) -> Partition:
    """Name the parts "0", "1", ... and sort their rows."""
    clients = {str(client): np.sort(rows).astype(np.int64) for client, rows in enumerate(parts)}
    return Partition(clients, np.sort(np.empty(0, dtype=np.int64) if left_out is None else left_out))


def _natural(where: str, held: dict[str, list[int]]) -> Partition:
    """Clients that already have names; their rows were collected in order."""
    if not held:
        raise DataError(f"{where}: there are no rows to split among clients")
    clients = {client: np.array(rows, dtype=np.int64) for client, rows in held.items()}
    return Partition(clients, np.empty(0, dtype=np.int64))


def _rows_by_class(of_class: NDArray[np.int64], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Each class's rows in random order."""
    shuffled = rng.permutation(len(of_class))
    order = shuffled[np.argsort(of_class[shuffled], kind="stable")]
    return np.split(order, np.cumsum(np.bincount(of_class))[:-1])


def _start(labels: Labels, clients: int, seed: int, min_size: int = 1) -> np.random.Generator:
    """Check what every random kind needs, and return its generator."""
    _whole("clients", clients)
    _whole("seed", seed, least=0)
    _whole("min_size", min_size)
    rows = len(labels)
    if clients > rows:
        raise ConfigError(f"{clients} clients cannot share {rows} rows; take at most as many clients as rows")
    if clients * min_size > rows:
        raise ConfigError(
            f"{clients} clients with min_size={min_size} need {clients * min_size} rows, "
            f"but there are {rows}; take a min_size of at most {rows // clients}, or fewer clients"
        )
    return np.random.default_rng(int(seed))


def _integers(labels: Labels) -> NDArray[np.int64]:
    found = np.asarray(labels)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise DataError(f"labels must be a 1-D array of integers, not {found.ndim}-D of {found.dtype}")
    return found.astype(np.int64)


def _whole(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value) or value <= 0:
        raise ConfigError(f"{name}={value!r} must be a finite number above 0")


def _names_no_client(where: str, row: int, value: object) -> DataError:
    return DataError(
        f"{where}: row index {row} (row number {row + 1}) has {value!r}, which names no client; "
        "every row needs a non-empty string"
    )
