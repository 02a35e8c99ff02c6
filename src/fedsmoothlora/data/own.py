"""The user's own map-style ``torch`` data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils.data import default_collate

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.tokens import IGNORED, padded
from fedsmoothlora.errors import DataError


class Indexed(Protocol):
    """A map-style data set: a length and rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any: ...


class OwnExamples:
    """Rows of a data set that gives ``(input, label)`` pairs, or dictionaries with ``labels``.

    Args:
        data: the data set; its rows are stacked by torch's ``default_collate``, or padded where a dictionary
            has ``input_ids``: on the left where labels are one a token, on the right otherwise.
        name: how errors call it.
        pad: the token that fills ``input_ids``.

    Raises:
        DataError: it is empty, or its first row is neither a pair nor a dictionary with ``labels``.
    """

    def __init__(self, data: Indexed, name: str, pad: int = 0) -> None:
        self._pad = pad
        if len(data) == 0:
            raise DataError(f"{name} has no rows")
        self._data = data
        first = data[0]
        if isinstance(first, Mapping):
            if "labels" not in first:
                raise DataError(f"{name}: its rows have the keys {sorted(first)}; they must have 'labels'")
        elif not (isinstance(first, Sequence) and len(first) == 2):
            raise DataError(
                f"{name}: its rows are {type(first).__name__}; they must be (input, label) pairs, or "
                "dictionaries of the model's inputs and 'labels'"
            )

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows as one batch: ``inputs`` and ``labels``, or a dictionary's own keys."""
        first = self._data[rows[0]]
        if isinstance(first, Mapping) and "input_ids" in first:
            return self._tokens([self._data[row] for row in rows])
        batch: Any = default_collate([self._data[row] for row in rows])
        found = (
            dict(batch) if isinstance(batch, Mapping) else dict(zip(("inputs", "labels"), batch, strict=True))
        )
        return {**found, "labels": found["labels"].long()}

    @property
    def labels_tokens(self) -> bool:
        """Whether labels are one a token, as a language model's are."""
        first = self._data[0]
        return isinstance(first, Mapping) and _is_sequence(first["labels"])

    def _tokens(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Rows of tokens, padded to the longest; ``attention_mask`` is made where there is none."""
        left = self.labels_tokens
        fills = {"input_ids": self._pad, "labels": IGNORED}
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if _is_sequence(values[0]):
                lists = [torch.as_tensor(value).tolist() for value in values]
                batch[name] = padded(lists, fills.get(name, 0), left=left)
            else:
                batch[name] = default_collate(values)
        if "attention_mask" not in batch:
            ones = [[1] * len(row["input_ids"]) for row in rows]
            batch["attention_mask"] = padded(ones, 0, left=left)
        return {**batch, "labels": batch["labels"].long()}


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, torch.Tensor) and value.ndim == 1)
