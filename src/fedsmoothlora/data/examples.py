"""The interface of data for training and evaluation: a length, and batches of given rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Model inputs by name, and "labels".
Batch = dict[str, Tensor]


class DeviceBatch(dict[str, Tensor]):
    """A batch on a device, which remembers the batch on the host that it was copied from.

    Values can be checked on the host, where that does not wait for the device.

    Args:
        values: the tensors on the device.
        host: the tensors on the host, of the same names.
    """

    def __init__(self, values: Mapping[str, Tensor], host: Mapping[str, Tensor]) -> None:
        super().__init__(values)
        self.host = dict(host)


def on_host(batch: Batch) -> Batch:
    """The batch on the host that a `DeviceBatch` was copied from; any other batch is returned as it is."""
    return batch.host if isinstance(batch, DeviceBatch) else batch


def without(batch: Batch, *names: str) -> Batch:
    """The batch without the tensors of these names."""
    kept = {name: value for name, value in batch.items() if name not in names}
    if not isinstance(batch, DeviceBatch):
        return kept
    return DeviceBatch(kept, {name: value for name, value in batch.host.items() if name not in names})


class Examples(Protocol):
    """Rows that a task can be trained or evaluated on."""

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows as one batch, in the given order."""
        ...


@dataclass(frozen=True)
class Subset:
    """Some rows of other examples, such as one client's share."""

    examples: Examples
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int] | None:
        """The number of tokens of each row; None if the examples do not know it."""
        of_all = getattr(self.examples, "lengths", None)
        return None if of_all is None else [of_all[row] for row in self.rows]

    @property
    def labels(self) -> Tensor | None:
        """The label of each row, ``(rows,)``; None if the examples know labels only batch by batch."""
        of_all = getattr(self.examples, "labels", None)
        return None if of_all is None else of_all[torch.from_numpy(self.rows)]

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows of the subset as one batch."""
        return self.examples.batch(self.rows[np.asarray(rows, dtype=np.int64)].tolist())


@dataclass(frozen=True, eq=False)
class Vectors:
    """Rows of one vector and one class each.

    Attributes:
        inputs: ``(rows, width)``.
        labels: ``(rows,)``, int64.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int]) -> Batch:
        """``inputs``, ``(rows, width)``, and ``labels (rows,)``."""
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        return {"inputs": self.inputs[chosen], "labels": self.labels[chosen]}


def labels_of(examples: Examples) -> Tensor:
    """The label of every row, ``(rows,)``; read batch by batch unless the examples know them."""
    known = getattr(examples, "labels", None)
    if known is not None:
        return torch.as_tensor(known)
    return torch.cat([examples.batch([row])["labels"] for row in range(len(examples))])


class BatchOrder:
    """An endless, seeded order of batches, which uses every row once in each pass.

    Each pass has a new random order. The last batch of a pass may be smaller.

    Args:
        rows: number of rows, at least 1.
        batch_size: number of rows in a batch.
        generator: the generator of the random orders.
    """

    def __init__(self, rows: int, batch_size: int, generator: torch.Generator) -> None:
        if rows < 1 or batch_size < 1:
            raise ValueError(
                f"batches need at least 1 row and a size of at least 1; got {rows}, {batch_size}"
            )
        self.rows = rows
        self.batch_size = batch_size
        self._generator = generator
        self._left: list[list[int]] = []

    @property
    def batches_per_pass(self) -> int:
        """The number of batches in one pass over all rows."""
        return -(-self.rows // self.batch_size)

    def take(self, batches: int) -> list[list[int]]:
        """The next ``batches`` lists of rows."""
        while len(self._left) < batches:
            order = torch.randperm(self.rows, generator=self._generator).tolist()
            self._left += [order[i : i + self.batch_size] for i in range(0, self.rows, self.batch_size)]
        taken, self._left = self._left[:batches], self._left[batches:]
        return taken
