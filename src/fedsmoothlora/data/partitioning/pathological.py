"""Give each client exactly `classes_per_client` classes, and split each class among its holders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from fedsmoothlora.data.partitioning.base import Partitioning, Rows
from fedsmoothlora.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fedsmoothlora.data.partitions import Labels, Partition


@dataclass(frozen=True, kw_only=True)
class Pathological(Partitioning):
    """Give each client exactly `classes_per_client` classes, and split each class among its holders.

    Attributes:
        kind: ``pathological``.
        clients: number of clients.
        classes_per_client: distinct classes that each client sees.
    """

    kind: Literal["pathological"] = "pathological"
    clients: Annotated[int, Ge(1)]
    classes_per_client: Annotated[int, Ge(1)]

    def deal(self, rows: Rows, seed: int) -> Partition:
        """See `pathological`."""
        return pathological(rows.classes_for(self.kind), self.clients, seed, self.classes_per_client)


def pathological(labels: Labels, clients: int, seed: int, classes_per_client: int) -> Partition:
    """Give each client exactly `classes_per_client` classes, and split each class among its holders.

    Classes are drawn in passes, each a random order of all classes. The numbers of clients that hold a class
    (its holders) therefore differ by at most one, except that no class has more holders than rows. A class's
    shuffled rows are split among its holders in parts that differ by at most one row. If
    clients * classes_per_client is below the number of classes, rows of classes that were not drawn are left
    out.

    Args:
        labels: class of every row, (rows,), integers.
        clients: number of clients, from 1 to the number of rows.
        seed: seed of every draw, at least 0.
        classes_per_client: distinct classes each client sees, from 1 to the number of classes in `labels`.

    Raises:
        ConfigError: `labels` is not a 1-D integer array, a parameter is out of range, there are more clients
            than rows, or the classes have too few rows to give every client that many classes.

    Source: the quantity-based label imbalance (#C = k) of Li et al., arXiv:2102.02079, with balanced draws.
    """
    import numpy as np

    from fedsmoothlora.data.arguments import as_integers, check_whole
    from fedsmoothlora.data.dealing import checked_generator, numbered_clients, rows_by_class

    labels = as_integers(labels)
    check_whole("classes_per_client", classes_per_client)
    rng = checked_generator(labels, clients, seed)
    _, of_class = np.unique(labels, return_inverse=True)
    class_sizes = np.bincount(of_class)  # (classes,)
    classes = len(class_sizes)
    if classes_per_client > classes:
        raise ConfigError(
            f"pathological: classes_per_client={classes_per_client}, but the labels have only {classes} "
            f"classes; use at most {classes}"
        )
    most = np.minimum(class_sizes, clients)  # (classes,): each holder needs a row and holds a class once
    draws = clients * classes_per_client
    if most.sum() < draws:
        raise ConfigError(
            f"pathological: {clients} clients with classes_per_client={classes_per_client} need {draws} "
            f"places, but the {classes} classes have rows for only {most.sum()}; use fewer clients or fewer "
            "classes per client"
        )
    places = np.zeros(classes, dtype=np.int64)  # (classes,), number of clients that will hold each class
    while (undealt := draws - int(places.sum())) > 0:
        places[rng.permutation(np.flatnonzero(places < most))[:undealt]] += 1

    # Each client gets the classes with the most open places. This always succeeds (Gale and Ryser): while m
    # clients remain, m * classes_per_client places are open, at most m in each class.
    holders: list[list[int]] = [[] for _ in range(classes)]
    for client in rng.permutation(clients):
        order = rng.permutation(classes)  # breaks ties at random
        drawn = order[np.argsort(-places[order], kind="stable")[:classes_per_client]]
        places[drawn] -= 1
        for of in drawn:
            holders[of].append(int(client))

    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
    left_out = [np.empty(0, dtype=np.int64)]
    for held, clients_of_class in zip(rows_by_class(of_class, rng), holders, strict=True):
        if not clients_of_class:
            left_out.append(held)
            continue
        # The first parts may be one row larger, so the order of the clients is random too.
        first_to_last = rng.permutation(clients_of_class)
        for client, piece in zip(first_to_last, np.array_split(held, len(first_to_last)), strict=True):
            parts[client].append(piece)
    return numbered_clients([np.concatenate(part) for part in parts], np.concatenate(left_out))
