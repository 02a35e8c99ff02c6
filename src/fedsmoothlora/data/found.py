"""The rows that a reader has found, and the numbers of their classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.raw import LabelledRows
from fedsmoothlora.data.texts import UNLABELLED, sorted_names
from fedsmoothlora.errors import DataError

Kept = TypeVar("Kept", bound=LabelledRows)
KeptByReader = TypeVar("KeptByReader", bound=LabelledRows, covariant=True)

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


class Found(Protocol[KeptByReader]):
    """The rows that a reader returns, before the classes are known."""

    @property
    def labels(self) -> list[str] | None: ...
    @property
    def places(self) -> list[str]: ...
    @property
    def label_column(self) -> str | None: ...
    @property
    def declared(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def clients(self) -> list[str] | None: ...
    @property
    def files(self) -> list[str] | None: ...
    @property
    def notes(self) -> list[str]: ...

    def labelled(self, labels: NDArray[np.int64], classes: tuple[str, ...]) -> KeptByReader:
        """The rows with their classes' numbers."""
        ...


def classes_of(found: Found[Kept]) -> tuple[str, ...]:
    """The classes that occur in rows, sorted, or those that the data set declares; empty for unlabelled rows.

    Raises ``DataError`` with the place of a row if labels are decimal numbers, or if there is only one class.
    """
    if found.labels is None:
        return UNLABELLED
    if found.label_column is not None and found.label_column in found.declared:
        return found.declared[found.label_column]
    names = set(found.labels)
    if all(map(_NUMBER.fullmatch, names)) and not all(float(name).is_integer() for name in names):
        first = next(row for row, name in enumerate(found.labels) if not float(name).is_integer())
        raise DataError(
            f"{found.places[first]}{_column(found)}: the label is the decimal number {found.labels[first]}; "
            f"classes are texts or whole numbers. If these {len(names)} values are classes, name them in "
            "data.classes; to predict numbers, set task.kind = 'text-regression'; otherwise write a "
            "class into each row, such as a range of values"
        )
    if len(names) == 1:
        raise DataError(
            f"{found.places[0]}{_column(found)}: there is only one class, {found.labels[0]!r}; should be more"
        )
    return sorted_names(names)


def named(found: Found[Kept], classes: tuple[str, ...]) -> tuple[str, ...]:
    """Check that every row's class is in ``data.classes``, and return these; empty for unlabelled rows."""
    for place, name in zip(found.places, found.labels or (), strict=bool(found.labels)):
        if classes and name not in classes:
            raise DataError(
                f"{place}{_column(found)}: the class {name!r} is not in data.classes = {', '.join(classes)}"
            )
    return classes if found.labels is not None else ()


def labelled(found: Found[Kept], classes: tuple[str, ...]) -> Kept:
    """The rows with the numbers of their classes, their places in ``classes``.

    Raises ``DataError`` with the place of a row whose class is not among them.
    """
    if found.labels is None:
        return found.labelled(np.zeros(len(found.places), dtype=np.int64), classes)
    number = {name: label for label, name in enumerate(classes)}
    for place, name in zip(found.places, found.labels, strict=True):
        if name not in number:
            raise DataError(
                f"{place}{_column(found)}: the class {name!r} is not in the training set, whose classes are "
                + ", ".join(classes)
            )
    return found.labelled(np.array([number[name] for name in found.labels], dtype=np.int64), classes)


def _column(found: Found[Kept]) -> str:
    return f", column {found.label_column!r}" if found.label_column is not None else ""
