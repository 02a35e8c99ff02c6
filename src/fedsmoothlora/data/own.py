"""The user's own map-style ``torch`` data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.tokens import IGNORED, padded
from fedsmoothlora.errors import DataError


class Indexed(Protocol):
    """A map-style data set: a length and rows by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Any: ...


class OwnExamples:
    """Rows of a data set of ``(input, label)`` pairs, or of dictionaries with ``labels``.

    Labels keep their type, but integers of any width become int64. The objective checks whether it can use
    the labels.

    Args:
        data: the data set. Its rows are stacked by torch's ``default_collate``. Rows with ``input_ids`` are
            padded instead: on the left if there is one label for each token, on the right otherwise.
        name: name of the data set in errors.
        pad: the padding token of ``input_ids``.

    Raises:
        DataError: the data set is empty, or its first row is neither a pair nor a dictionary with ``labels``,
            or its label is not a number.
    """

    def __init__(self, data: Indexed, name: str, pad: int = 0) -> None:
        self._pad = pad
        self._name = name
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
        self._check(_label(first), 0)
        self.first_label = _widened(torch.as_tensor(_label(first))).unsqueeze(0)  # as in a batch of this row

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows as one batch: ``inputs`` and ``labels``, or the keys of the dictionaries.

        Raises ``DataError`` for a label that is not a finite number.
        """
        chosen = [self._data[row] for row in rows]
        for number, row in zip(rows, chosen, strict=True):
            self._check(_label(row), number)
        if isinstance(chosen[0], Mapping) and "input_ids" in chosen[0]:
            batch = self._tokens(chosen)
        else:
            stacked: Any = default_collate(chosen)
            batch = dict(
                stacked if isinstance(stacked, Mapping) else zip(("inputs", "labels"), stacked, strict=True)
            )
        return {**batch, "labels": _widened(batch["labels"])}

    @cached_property
    def labels(self) -> Tensor:
        """The label of each row, ``(rows,)``. Reading the labels reads every row once."""
        found = [_label(self._data[row]) for row in range(len(self))]
        for row, label in enumerate(found):
            self._check(label, row)
        return _widened(torch.stack([torch.as_tensor(label) for label in found]))

    @property
    def labels_tokens(self) -> bool:
        """Whether there is one label for each token, as for language models."""
        first = self._data[0]
        return isinstance(first, Mapping) and "input_ids" in first and _is_sequence(first["labels"])

    def _check(self, label: Any, row: int) -> None:
        try:
            numbers = torch.as_tensor(label)
        except (TypeError, ValueError, RuntimeError):
            raise DataError(
                f"{self._name}: the label of row {row} is {label!r}; it should be a number, or a tensor of "
                "numbers"
            ) from None
        if numbers.is_floating_point() and not bool(numbers.isfinite().all()):
            raise DataError(f"{self._name}: the label of row {row} is {label!r}; it should be finite")

    def _tokens(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """Rows of tokens, padded to the longest, with an ``attention_mask`` if the rows have none."""
        left = self.labels_tokens
        fills = {"input_ids": self._pad, "labels": IGNORED}
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if _is_sequence(values[0]):
                batch[name] = _padded(
                    [torch.as_tensor(value) for value in values], fills.get(name, 0), left=left
                )
            else:
                batch[name] = default_collate(values)
        if "attention_mask" not in batch:
            ones = [[1] * len(row["input_ids"]) for row in rows]
            batch["attention_mask"] = padded(ones, 0, left=left)
        return batch


def _label(row: Any) -> Any:
    return row["labels"] if isinstance(row, Mapping) else row[1]


def _widened(labels: Tensor) -> Tensor:
    """Integers as int64, which torch's losses take; other types unchanged."""
    is_integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return labels.long() if is_integer else labels


def _padded(rows: Sequence[Tensor], fill: int, *, left: bool) -> Tensor:
    """Rows of different lengths as one tensor, ``(rows, longest)``; floats stay floats."""
    if any(row.is_floating_point() for row in rows):
        side = "left" if left else "right"
        return pad_sequence(list(rows), batch_first=True, padding_value=fill, padding_side=side)
    return padded([row.tolist() for row in rows], fill, left=left)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, torch.Tensor) and value.ndim == 1)
