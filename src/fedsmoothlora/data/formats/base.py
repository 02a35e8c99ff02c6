"""The interface of a kind of table file."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fedsmoothlora.errors import DataError

# The columns to read, each with the configuration key that names it.
Wanted = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """The wanted columns of a table.

    Attributes:
        cells: each column's cells: a list of Python values, or an Arrow column.
        length: the number of rows.
        classes: the names of the classes by column, if the file itself declares them.
        notes: notes for the user on the format of the file.
        clients: the client of each row, if the file is one JSON object of clients.
    """

    cells: Mapping[str, Any]
    length: int
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    clients: Sequence[str] | None = None


class Format(ABC):
    """A kind of table file.

    Attributes:
        suffixes: the suffixes of its files' names, in lower case.
    """

    suffixes: ClassVar[tuple[str, ...]]

    @abstractmethod
    def read(self, path: Path, wanted: Wanted) -> Columns:
        """Read the wanted columns.

        Raises:
            DataError: the file is damaged, has no rows, or lacks a column; the message names the file, and if
                possible the row and the column.
        """

    @abstractmethod
    def first_rows(self, path: Path, count: int) -> list[Mapping[str, Any]]:
        """The first rows, at most ``count``, each by column; numbers of JSON are numbers here.

        Raises ``DataError`` if the file cannot be read.
        """

    def column_names(self, path: Path) -> tuple[str, ...]:
        """The names of the columns. Raises ``DataError`` if the file cannot be read."""
        return tuple(dict.fromkeys(name for row in self.first_rows(path, 1) for name in row))

    def clients(self, path: Path) -> tuple[str, ...]:
        """The clients that the file itself names; empty for most kinds.

        Raises ``DataError`` if the file cannot be read.
        """
        return ()

    def place(self, path: Path) -> Callable[[int], str]:
        """A function from a row's number, counted from 0, to a description of its place in the file."""
        return lambda row: f"{path}: row {row + 1} (counted from 1)"


def check_columns(origin: str, found: Sequence[str], wanted: Wanted) -> None:
    """Raise ``DataError`` unless each wanted column occurs exactly once."""
    for column, key in wanted.items():
        if column not in found:
            close = difflib.get_close_matches(column, found, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise DataError(
                f"{origin}: there is no column {column!r} ({key}){hint} "
                f"The columns are: {', '.join(map(str, found))}"
            )
        if found.count(column) > 1:
            raise DataError(f"{origin}: {found.count(column)} columns are called {column!r}")


def reason(error: BaseException) -> str:
    """The first line of the innermost error's message."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
