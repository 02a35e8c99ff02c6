"""Tokenised texts, padded to the longest row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsmoothlora.data.examples import Batch

IGNORED = -100  # label of a token without a loss; the default ``ignore_index`` of torch's cross-entropy


@dataclass(frozen=True, eq=False)
class Documents:
    """Tokenised texts, each with a class, for sequence classification; batches are padded on the right.

    Attributes:
        ids: tokens of each row.
        labels: ``(rows,)``, int64; float32 targets of other tasks, ``(rows,)`` or ``(rows, labels)``.
        pad: the padding token.
        segments: for pairs of texts, the number of the text that each token belongs to; None without them.
    """

    ids: Sequence[Sequence[int]]
    labels: Tensor
    pad: int
    segments: Sequence[Sequence[int]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return [len(ids) for ids in self.ids]

    def batch(self, rows: Sequence[int]) -> Batch:
        """``input_ids`` and ``attention_mask``, ``(rows, longest)``, and ``labels``.

        With segments, also ``token_type_ids``, ``(rows, longest)``.
        """
        chosen = [list(self.ids[row]) for row in rows]
        segments = self.segments
        return {
            "input_ids": padded(chosen, self.pad, left=False),
            "attention_mask": padded([[1] * len(ids) for ids in chosen], 0, left=False),
            **(
                {}
                if segments is None
                else {"token_type_ids": padded([segments[row] for row in rows], 0, left=False)}
            ),
            "labels": self.labels[torch.as_tensor(rows, dtype=torch.int64)],
        }


@dataclass(frozen=True, eq=False)
class TaggedWords:
    """Tokenised sentences with a tag for each word, for token classification; padded on the right.

    Attributes:
        ids: tokens of each row.
        tags: number of the tag at each token, of the same lengths; -100 at tokens without one.
        pad: the padding token.
    """

    ids: Sequence[Sequence[int]]
    tags: Sequence[Sequence[int]]
    pad: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return [len(ids) for ids in self.ids]

    @property
    def labels(self) -> Tensor:
        """The tags of all rows, ``(rows, longest)``."""
        return padded(self.tags, IGNORED, left=False)

    def batch(self, rows: Sequence[int]) -> Batch:
        """``input_ids``, ``attention_mask`` and ``labels``, all ``(rows, longest)``."""
        chosen = [self.ids[row] for row in rows]
        return {
            "input_ids": padded(chosen, self.pad, left=False),
            "attention_mask": padded([[1] * len(ids) for ids in chosen], 0, left=False),
            "labels": padded([self.tags[row] for row in rows], IGNORED, left=False),
        }


@dataclass(frozen=True, eq=False)
class Translations:
    """Inputs and answers, for a model with an encoder and a decoder; both are padded on the right.

    Attributes:
        sources: tokens of each row's input.
        targets: tokens of each row's answer.
        pad: the padding token.
    """

    sources: Sequence[Sequence[int]]
    targets: Sequence[Sequence[int]]
    pad: int

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row's input."""
        return [len(ids) for ids in self.sources]

    def batch(self, rows: Sequence[int]) -> Batch:
        """``input_ids`` and ``attention_mask``, ``(rows, longest)``, and the answers as ``labels``."""
        chosen = [self.sources[row] for row in rows]
        return {
            "input_ids": padded(chosen, self.pad, left=False),
            "attention_mask": padded([[1] * len(ids) for ids in chosen], 0, left=False),
            "labels": padded([self.targets[row] for row in rows], IGNORED, left=False),
        }


@dataclass(frozen=True, eq=False)
class Completions:
    """Prompts and answers, for a causal language model.

    Batches are padded on the left, so that all rows end in the last column.

    Attributes:
        prompts: tokens of each row's prompt.
        answers: tokens of each row's answer, with its end of sequence.
        pad: the padding token.
    """

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    pad: int

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row, prompt and answer together."""
        return [len(p) + len(a) for p, a in zip(self.prompts, self.answers, strict=True)]

    def batch(self, rows: Sequence[int]) -> Batch:
        """A batch with labels for the answers only.

        ``input_ids`` and ``attention_mask`` are ``(rows, longest)``. ``labels``, ``(rows, longest answer)``,
        correspond to the last columns of ``input_ids``, so logits of prompts need not be computed.
        """
        whole = [[*self.prompts[row], *self.answers[row]] for row in rows]
        # The first token of a row has no loss, because no token precedes it.
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
    """Cut a batch into ``parts`` with nearly equal numbers of rows, and rows of similar length in one part.

    If there is an ``attention_mask``, columns that are padding in all rows of a part are removed from it.
    """
    mask = batch.get("attention_mask")
    rows = len(batch["labels"])
    order = torch.arange(rows) if mask is None else mask.sum(dim=1).argsort(stable=True)
    chunks = order.tensor_split(min(parts, rows))
    return [narrowed({name: value[chunk] for name, value in batch.items()}) for chunk in chunks]


def narrowed(batch: Batch) -> Batch:
    """The batch without columns that are padding in all rows, by its ``attention_mask``."""
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
        else:  # labels of the last columns only
            narrow[name] = value[:, max(value.shape[1] - (last - first), 0) :]
    return narrow


def by_length(examples: object, rows: int) -> list[int]:
    """The row indices from the shortest to the longest row, or in order if lengths are not known."""
    lengths = getattr(examples, "lengths", None)
    if lengths is None:
        return list(range(rows))
    return sorted(range(rows), key=lambda row: lengths[row])
