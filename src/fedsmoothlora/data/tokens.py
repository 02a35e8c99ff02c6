"""Texts as tokens, padded to the longest row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsmoothlora.data.examples import Batch

IGNORED = -100  # the label of a token that no loss is taken of; torch's cross-entropy passes over it


@dataclass(frozen=True, eq=False)
class Documents:
    """Whole texts with a class each, for sequence classification; padded on the right.

    Attributes:
        ids: tokens of each row.
        labels: ``(rows,)``, int64.
        pad: the token that fills a batch.
    """

    ids: Sequence[Sequence[int]]
    labels: Tensor
    pad: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(ids) for ids in self.ids]

    def batch(self, rows: Sequence[int]) -> Batch:
        """``input_ids`` and ``attention_mask``, ``(rows, longest)``, and ``labels (rows,)``."""
        chosen = [list(self.ids[row]) for row in rows]
        return {
            "input_ids": padded(chosen, self.pad, left=False),
            "attention_mask": padded([[1] * len(ids) for ids in chosen], 0, left=False),
            "labels": self.labels[torch.as_tensor(rows, dtype=torch.int64)],
        }


@dataclass(frozen=True, eq=False)
class Completions:
    """Prompts and their answers, for a causal language model; padded on the left, so that rows end together.

    Attributes:
        prompts: tokens of each row's prompt.
        answers: tokens of each row's answer, its end of sequence among them.
        pad: the token that fills a batch.
    """

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    pad: int

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, prompt and answer."""
        return [len(p) + len(a) for p, a in zip(self.prompts, self.answers, strict=True)]

    def batch(self, rows: Sequence[int]) -> Batch:
        """A batch whose loss is on the answers.

        ``input_ids`` and ``attention_mask`` are ``(rows, longest)``. ``labels``, ``(rows, longest answer)``,
        belongs to the last tokens of ``input_ids``, so that a prompt's logits are never computed.
        """
        whole = [[*self.prompts[row], *self.answers[row]] for row in rows]
        # A row's first token has nothing before it that could predict it.
        answers = [list(self.answers[row][0 if self.prompts[row] else 1 :]) for row in rows]
        return {
            "input_ids": padded(whole, self.pad, left=True),
            "attention_mask": padded([[1] * len(ids) for ids in whole], 0, left=True),
            "labels": padded(answers, IGNORED, left=True),
        }


def padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool) -> Tensor:
    """Rows of different lengths as one tensor, ``(rows, longest)``, int64."""
    longest = max(len(row) for row in rows)
    filled = [[fill] * (longest - len(row)) for row in rows]
    both = zip(filled, rows, strict=True) if left else zip(rows, filled, strict=True)
    return torch.tensor([[*first, *second] for first, second in both], dtype=torch.int64)


def cut(batch: Batch, parts: int) -> list[Batch]:
    """A batch in ``parts`` of nearly equal numbers of rows, rows of like length together.

    Where there is an ``attention_mask``, columns that are padding in all of a part's rows are left out.
    """
    mask = batch.get("attention_mask")
    rows = len(batch["labels"])
    order = torch.arange(rows) if mask is None else mask.sum(dim=1).argsort(stable=True)
    chunks = order.tensor_split(min(parts, rows))
    return [_narrowed({name: value[chunk] for name, value in batch.items()}) for chunk in chunks]


def _narrowed(batch: Batch) -> Batch:
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    used = mask.bool().any(dim=0).nonzero()
    first, last = int(used[0]), int(used[-1]) + 1
    columns = mask.shape[1]
    narrow = {}
    for name, value in batch.items():
        if value.ndim < 2:
            narrow[name] = value
        elif value.shape[1] == columns:
            narrow[name] = value[:, first:last]
        else:  # labels of the last columns
            narrow[name] = value[:, max(value.shape[1] - (last - first), 0) :]
    return narrow


def by_length(examples: object, rows: int) -> list[int]:
    """The rows from the shortest to the longest; in their own order where the lengths are unknown."""
    lengths = getattr(examples, "lengths", None)
    if lengths is None:
        return list(range(rows))
    return sorted(range(rows), key=lambda row: lengths[row])
