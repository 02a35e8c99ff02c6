"""Texts before tokenisation: columns of text, and of lists of words, and a label for each row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.errors import DataError

# The only class of rows without labels, for partitions and their tables.
UNLABELLED = ("all rows",)


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Texts:
    """Rows of text.

    Attributes:
        columns: each column's texts, ``(rows,)``, by name.
        labels: ``(rows,)``, int64: the index of each row's class in ``classes``.
        classes: the classes' names, in the labels' order; ``UNLABELLED`` if rows have no labels.
        places: the place of each row, for errors; its number in the data set if not given.
        lists: each column's lists of texts, such as the words of a sentence, ``(rows,)``, by name.

    Raises:
        DataError: columns or labels differ in length, or a label is not the index of a class.
    """

    columns: Mapping[str, Sequence[str]]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    places: Sequence[str] | None = None
    lists: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in (*self.columns.items(), *self.lists.items()):
            if len(values) != len(self.labels):
                raise DataError(f"column {name!r} has {len(values)} rows, and there are {len(self)} labels")
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{self.place(row)} has the label {self.labels[row]}; should be 0 to {len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.labels)

    def row(self, row: int) -> dict[str, str]:
        """One row's text by column."""
        return {name: values[row] for name, values in self.columns.items()}

    def place(self, row: int) -> str:
        """The place of a row, for messages."""
        return f"row {row + 1}" if self.places is None else self.places[row]

    def take(self, rows: NDArray[np.int64]) -> Texts:
        """These rows only, in the given order."""
        return Texts(
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
            labels=self.labels[rows],
            classes=self.classes,
            places=None if self.places is None else [self.places[row] for row in rows],
            lists={name: [values[row] for row in rows] for name, values in self.lists.items()},
        )


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Names of classes in their order: whole numbers by their value, others by their letters."""
    different = set(names)
    if all(re.fullmatch(r"[+-]?[0-9]+", name) for name in different):
        return tuple(sorted(different, key=lambda name: (int(name), name)))
    return tuple(sorted(different))


def normalised(text: str) -> str:
    """The letters and digits of a text in lower case, for comparisons."""
    return re.sub(r"[\W_]+", "", text.casefold())


def first_of_each(texts: Sequence[str]) -> NDArray[np.int64]:
    """The first row of each normalised text, sorted."""
    first: dict[str, int] = {}
    for row, text in enumerate(texts):
        first.setdefault(normalised(text), row)
    return np.array(list(first.values()), dtype=np.int64)


def held_out(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """``(rows,)``: whether a row is held out. ``seed`` draws ``share`` of each class's rows, rounded."""
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen[rng.permutation(rows)[: round(share * len(rows))]] = True
    return chosen
