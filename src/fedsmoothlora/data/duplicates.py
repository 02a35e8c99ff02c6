"""Find test rows that are also training rows, equal rows with different labels, and similar class names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.texts import Texts

_NAMED = 5  # groups of classes that a note lists


@dataclass(frozen=True, kw_only=True, eq=False)
class HashedRows:
    """Rows by a hash of their content.

    Attributes:
        digests: ``(rows,)``, the hash of each row's input, without its label.
        labels: ``(rows,)``, the number of each row's class.
        place: a function from a row's number, counted from 0, to a description of its place.
    """

    digests: Sequence[bytes]
    labels: NDArray[np.int64]
    place: Callable[[int], str]


def hashed_texts(texts: Texts, columns: Iterable[str]) -> HashedRows:
    """Hash rows of text by these columns, of texts or of lists of texts."""
    chosen = [
        ["\0".join(words) for words in texts.lists[name]] if name in texts.lists else texts.columns[name]
        for name in columns
    ]
    return HashedRows(
        digests=[digest(text.encode() for text in row) for row in zip(*chosen, strict=True)],
        labels=texts.labels,
        place=texts.place,
    )


def digest(parts: Iterable[bytes]) -> bytes:
    """A hash of 16 bytes (BLAKE2b) of a row's parts, in their order."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))  # so that ("ab", "c") differs from ("a", "bc")
        found.update(part)
    return found.digest()


def duplicate_notes(train: HashedRows, test: HashedRows | None, classes: Sequence[str]) -> list[str]:
    """Notes on test rows that are also training rows, and on equal rows with different labels.

    Args:
        train: the training rows.
        test: the test rows, if there are any.
        classes: names of the classes.
    """
    parts = [train] if test is None else [train, test]
    first: dict[bytes, tuple[HashedRows, int]] = {}
    contradicting: dict[bytes, str] = {}
    for part in parts:
        for row, (key, label) in enumerate(zip(part.digests, part.labels, strict=True)):
            other, number = first.setdefault(key, (part, row))
            if other.labels[number] != label and key not in contradicting:
                contradicting[key] = (
                    f"{other.place(number)} has {classes[other.labels[number]]!r}, "
                    f"{part.place(row)} has {classes[label]!r}"
                )
    notes = []
    shared = [] if test is None else [row for row, key in enumerate(test.digests) if first[key][0] is train]
    if test is not None and shared:
        _, number = first[test.digests[shared[0]]]
        notes.append(
            f"{len(shared)} of {len(test.digests)} test rows are also training rows, so test metrics are too "
            f"good; first: {test.place(shared[0])} equals {train.place(number)}"
        )
    if contradicting:
        count = len(contradicting)
        notes.append(
            f"{count} {'input has' if count == 1 else 'inputs have'} different labels in different rows; "
            f"first: {next(iter(contradicting.values()))}"
        )
    return notes


def similar_class_notes(classes: Sequence[str]) -> list[str]:
    """A note on classes whose names differ only in case or spaces, if there are any."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        groups.setdefault("".join(name.split()).casefold(), []).append(name)
    alike = [" and ".join(map(repr, names)) for names in groups.values() if len(names) > 1]
    if not alike:
        return []
    more = f" and {len(alike) - _NAMED} more" if len(alike) > _NAMED else ""
    return [f"classes whose names differ only in case or spaces: {'; '.join(alike[:_NAMED])}{more}"]
