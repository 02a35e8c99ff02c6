"""The user's own map-style ``torch`` data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch.utils.data import default_collate

from fedsmoothlora.data.examples import Batch


class Indexed(Protocol):
    """A map-style data set: a length and rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any: ...


class OwnExamples:
    """Rows of a data set that gives ``(input, label)`` pairs, or dictionaries with ``labels``.

    Args:
        data: the data set; its rows are stacked by torch's ``default_collate``.
        name: how errors call it.

    Raises:
        ValueError: it is empty, or its first row is neither a pair nor a dictionary with ``labels``.
    """

    def __init__(self, data: Indexed, name: str) -> None:
        if len(data) == 0:
            raise ValueError(f"{name} has no rows")
        self._data = data
        first = data[0]
        if isinstance(first, Mapping):
            if "labels" not in first:
                raise ValueError(f"{name}: its rows have the keys {sorted(first)}; they must have 'labels'")
        elif not (isinstance(first, Sequence) and len(first) == 2):
            raise ValueError(
                f"{name}: its rows are {type(first).__name__}; they must be (input, label) pairs, or "
                "dictionaries of the model's inputs and 'labels'"
            )

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows as one batch: ``inputs`` and ``labels``, or a dictionary's own keys."""
        batch: Any = default_collate([self._data[row] for row in rows])
        found = (
            dict(batch) if isinstance(batch, Mapping) else dict(zip(("inputs", "labels"), batch, strict=True))
        )
        return {**found, "labels": found["labels"].long()}
