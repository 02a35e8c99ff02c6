"""Tokenised texts, padded to the longest row of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.errors import ConfigError, DataError

# The tokens of a row, and a label for each.
TaughtRow = tuple[list[int], list[int]]

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

    @cached_property
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

    @cached_property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return [len(ids) for ids in self.ids]

    @cached_property
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

    @cached_property
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

    @cached_property
    def lengths(self) -> list[int]:
        """Number of tokens of each row, prompt and answer together."""
        return [len(p) + len(a) for p, a in zip(self.prompts, self.answers, strict=True)]

    def row(self, row: int) -> TaughtRow:
        """One row's tokens and labels."""
        prompt, answer = self.prompts[row], self.answers[row]
        return [*prompt, *answer], [IGNORED] * len(prompt) + list(answer)

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


@dataclass(frozen=True, eq=False)
class Dialogues:
    """Tokenised texts of which a model learns some tokens, such as the assistant's turns of chats.

    Batches are padded on the left.

    Attributes:
        ids: tokens of each row.
        taught: for each token of each row, whether the loss is taken on it.
        pad: the padding token.
    """

    ids: Sequence[Sequence[int]]
    taught: Sequence[Sequence[bool]]
    pad: int

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return [len(ids) for ids in self.ids]

    def row(self, row: int) -> TaughtRow:
        """One row's tokens and labels."""
        pairs = zip(self.ids[row], self.taught[row], strict=True)
        return list(self.ids[row]), [token if learned else IGNORED for token, learned in pairs]

    def batch(self, rows: Sequence[int]) -> Batch:
        """A batch with labels of the learned tokens.

        ``input_ids`` and ``attention_mask`` are ``(rows, longest)``. ``labels`` correspond to the last
        columns of ``input_ids``, from the first learned token of any row on.
        """
        found = [self.row(row) for row in rows]
        # The first token of a row has no loss, because no token precedes it.
        labels = [own[_first_label(own) :] for _, own in found]
        return {
            "input_ids": padded([ids for ids, _ in found], self.pad, left=True),
            "attention_mask": padded([[1] * len(ids) for ids, _ in found], 0, left=True),
            "labels": padded(labels, IGNORED, left=True),
        }


@dataclass(eq=False)
class Pairs:
    """Pairs of a chosen and a rejected answer to one prompt.

    Attributes:
        answers: the answers of all pairs, each with its prompt: row ``2 i`` is the chosen answer of pair
            ``i``, and row ``2 i + 1`` the rejected one.
        reference: ``(2 pairs,)``, the log-probability of every answer by the reference model; NaN before it
            is computed.
    """

    answers: TaughtRows
    reference: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.reference = torch.full((len(self.answers),), torch.nan)

    def __len__(self) -> int:
        return len(self.answers) // 2

    @cached_property
    def lengths(self) -> list[int]:
        """Number of tokens of the longer row of each pair."""
        lengths = self.answers.lengths
        return [max(lengths[2 * pair : 2 * pair + 2]) for pair in range(len(self))]

    def batch(self, rows: Sequence[int]) -> Batch:
        """The answers of pairs, as `Completions.batch`, two rows for each pair, and their ``reference``."""
        chosen = [number for pair in rows for number in (2 * pair, 2 * pair + 1)]
        return {**self.answers.batch(chosen), "reference": self.reference[chosen]}


class TaughtRows(Protocol):
    """Rows of tokens with labels, `Completions` or `Dialogues`."""

    def __len__(self) -> int: ...
    @property
    def lengths(self) -> list[int]: ...
    @property
    def pad(self) -> int: ...
    def row(self, row: int) -> TaughtRow: ...
    def batch(self, rows: Sequence[int]) -> Batch: ...


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of tokens whose batches hold several rows side by side in one sequence, with little padding.

    The rows of a batch and its loss are those of an unpacked batch: the mean over all its labels. A sequence
    is as long as the longest row of the batch, so a packed batch is never larger than the padded one.
    Positions begin at 0 in every row, which tells transformers to let no row attend to another. Padding is
    one more row, without labels. There is no ``attention_mask``, with which transformers would attend across
    rows.

    Attributes:
        rows: the rows.
    """

    rows: TaughtRows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row."""
        return self.rows.lengths

    def row(self, row: int) -> TaughtRow:
        """One row's tokens and labels."""
        return self.rows.row(row)

    def batch(self, rows: Sequence[int]) -> Batch:
        """``input_ids``, ``position_ids`` and ``labels``, each ``(sequences, longest)``."""
        found = [self.rows.row(row) for row in rows]
        width = max(len(ids) for ids, _ in found)
        sequences: dict[str, list[list[int]]] = {"input_ids": [], "position_ids": [], "labels": []}
        for chosen in side_by_side([len(ids) for ids, _ in found], width):
            ids: list[int] = []
            positions: list[int] = []
            labels: list[int] = []
            for number in chosen:
                own, own_labels = found[number]
                ids += own
                positions += range(len(own))
                labels += [IGNORED, *own_labels[1:]]  # no token of the row precedes its first
            left = width - len(ids)
            sequences["input_ids"].append(ids + [self.rows.pad] * left)
            sequences["position_ids"].append([*positions, *range(left)])
            sequences["labels"].append(labels + [IGNORED] * left)
        return {name: torch.tensor(value, dtype=torch.int64) for name, value in sequences.items()}


def side_by_side(lengths: Sequence[int], width: int) -> list[list[int]]:
    """The rows of each sequence: the longest first, each into the first sequence that has room for it.

    First-fit decreasing needs at most 11/9 of the smallest number of sequences, plus one.

    Args:
        lengths: number of tokens of each row, none above ``width``.
        width: number of tokens of a sequence.
    """
    chosen: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        at = next((number for number, left in enumerate(room) if left >= lengths[row]), len(room))
        if at == len(room):
            chosen.append([])
            room.append(width)
        chosen[at].append(row)
        room[at] -= lengths[row]
    return chosen


def _first_label(labels: Sequence[int]) -> int:
    """The index of the first label of a row, at least 1."""
    return next((n for n, label in enumerate(labels) if n and label != IGNORED), len(labels))


def padded(rows: Sequence[Sequence[int]], fill: int, *, left: bool) -> Tensor:
    """Rows of different lengths as one tensor, ``(rows, longest)``, int64."""
    longest = max(len(row) for row in rows)
    filled = [[fill] * (longest - len(row)) for row in rows]
    both = zip(filled, rows, strict=True) if left else zip(rows, filled, strict=True)
    return torch.tensor([[*first, *second] for first, second in both], dtype=torch.int64)


@dataclass(frozen=True)
class TokenBudget:
    """The largest number of tokens of a part of a batch, with its padding.

    A part has as many columns as its longest row has tokens. A row, or several rows that stay together, with
    more tokens than the budget is a part of its own.

    Attributes:
        tokens: rows times columns of a part.
    """

    tokens: int

    def sizes(self, lengths: Sequence[int], together: int = 1) -> list[int]:
        """The numbers of groups of rows in each part, as few parts as possible.

        Args:
            lengths: number of tokens of the longest row of each group, in ascending order.
            together: number of rows in a group.
        """
        found: list[int] = []
        for length in lengths:
            if found and (found[-1] + 1) * together * length <= self.tokens:
                found[-1] += 1
            else:
                found.append(1)
        return found


def cut(batch: Batch, parts: int | TokenBudget, *, together: int = 1) -> list[Batch]:
    """Cut a batch into parts, with rows of similar length in one part.

    If there is an ``attention_mask``, columns that are padding in all rows of a part are removed from it.

    Args:
        batch: the batch.
        parts: the largest number of parts, with nearly equal numbers of rows, or the tokens of a part.
        together: number of successive rows that stay in one part, in their order.

    Raises ``ConfigError`` if parts are limited by tokens and the batch has no ``input_ids``.
    """
    mask = batch.get("attention_mask")
    groups = len(batch["labels"]) // together
    order, lengths = torch.arange(groups), None
    if mask is not None:
        lengths = mask.sum(dim=1).view(groups, together).amax(dim=1)
        order = lengths.argsort(stable=True)
    if isinstance(parts, int):
        chosen = order.tensor_split(min(parts, groups))
    else:
        if "input_ids" not in batch:
            raise ConfigError(
                f"training.tokens_per_batch = {parts.tokens}: the batches have no tokens (input_ids); use "
                "training.accumulation"
            )
        width = batch["input_ids"].shape[1]  # without a mask no column is padding
        ascending = [width] * groups if lengths is None else lengths[order].tolist()
        chosen = order.split(parts.sizes(ascending, together))
    within = torch.arange(together, device=order.device)
    chunks = [(chunk[:, None] * together + within).flatten() for chunk in chosen]
    return [narrowed({name: value[chunk] for name, value in batch.items()}) for chunk in chunks]


def narrowed(batch: Batch) -> Batch:
    """The batch without columns that are padding in all rows, by its ``attention_mask``."""
    mask = batch.get("attention_mask")
    if mask is None:
        return batch
    used = mask.bool().any(dim=0).nonzero()
    if not len(used):
        return batch
    first, last = int(used[0]), int(used[-1]) + 1
    columns = mask.shape[1]
    narrow = {}
    for name, value in batch.items():
        if value.ndim > 1 and value.shape[1] == columns:
            narrow[name] = value[:, first:last]
        elif value.ndim > 1 and name == "labels":  # of the last columns only
            narrow[name] = value[:, max(value.shape[1] - (last - first), 0) :]
        else:
            narrow[name] = value
    return narrow


def joined(batches: Sequence[Batch], *, left: bool) -> Batch:
    """The rows of several batches as one batch, padded to the widest.

    Packed sequences (`Packed`) are padded on the right by one more row without labels.

    Args:
        batches: the batches.
        left: whether padding is added on the left, as for language models; otherwise on the right.

    Raises ``DataError`` if batches differ in more than their width, or have neither ``attention_mask`` nor
    ``position_ids`` to hide padding.
    """
    names = {name for batch in batches for name in batch}
    if some := sorted(name for name in names if not all(name in batch for batch in batches)):
        raise DataError(f"only some clients have {some[0]} in their rows; leave machine.batch_clients at 1")
    found = {}
    masked, packed = "attention_mask" in batches[0], "position_ids" in batches[0]
    for name in batches[0]:
        values = [batch[name] for batch in batches]
        if len({value.shape[1:] for value in values}) > 1:
            if not (masked or packed) or len({value.shape[2:] for value in values}) > 1:
                shapes = " and ".join(sorted({str(tuple(value.shape[1:])) for value in values}))
                raise DataError(
                    f"{name}: rows of clients have the shapes {shapes}, and padding needs an attention_mask; "
                    "leave machine.batch_clients at 1"
                )
            fill = IGNORED if name == "labels" else 0
            values = _widened(values, fill, left=left and masked)
            if name == "position_ids" and not masked:
                values = [
                    _numbered(value, batch[name].shape[1])
                    for value, batch in zip(values, batches, strict=True)
                ]
        found[name] = torch.cat(values)
    return found


def _widened(values: Sequence[Tensor], fill: int, *, left: bool) -> list[Tensor]:
    """Tensors ``(rows, columns, ...)`` with as many columns as the widest of them."""
    widest = max(value.shape[1] for value in values)
    found = []
    for value in values:
        padding = value.new_full((len(value), widest - value.shape[1], *value.shape[2:]), fill)
        found.append(torch.cat((padding, value) if left else (value, padding), dim=1))
    return found


def _numbered(positions: Tensor, first: int) -> Tensor:
    """Positions ``(rows, columns)`` that begin at 0 again in the column ``first``."""
    found = positions.clone()
    found[:, first:] = torch.arange(positions.shape[1] - first)
    return found


def by_length(examples: object, rows: int) -> list[int]:
    """The row indices from the shortest to the longest row, or in order if lengths are not known."""
    lengths = getattr(examples, "lengths", None)
    if lengths is None:
        return list(range(rows))
    return sorted(range(rows), key=lambda row: lengths[row])
