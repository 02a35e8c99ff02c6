"""Readers of table files: CSV, TSV, JSON, JSON Lines, Parquet, CoNLL, and folders of ``save_to_disk``.

Readers do not guess types: a cell of a CSV file is text, and a number of a JSON file keeps its digits.
Nothing is cached, so rows are always those of the file, and no copy of them remains on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedsmoothlora.data.formats.base import Columns, Format, Wanted
from fedsmoothlora.data.formats.conll import Conll
from fedsmoothlora.data.formats.delimited import Csv, Tsv
from fedsmoothlora.data.formats.json_rows import Json
from fedsmoothlora.data.formats.parquet import Parquet
from fedsmoothlora.data.formats.saved import Saved
from fedsmoothlora.printable import printable

_SAVED = Saved()
_FORMATS: tuple[Format, ...] = (Csv(), Json(), Parquet(), Tsv(), Conll())
_BY_SUFFIX = {suffix: one for one in _FORMATS for suffix in one.suffixes}
SUFFIXES = tuple(sorted(_BY_SUFFIX, key=lambda suffix: suffix.endswith(".gz")))  # compressed files last
"""The suffixes of table files."""

# JSON files beside the tables of a hub data set that have no rows.
_NO_TABLES = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}


def is_table(path: Path) -> bool:
    """Whether a path is a table file, or a folder written by ``save_to_disk``."""
    if path.is_dir():
        return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    return path.is_file() and path.name not in _NO_TABLES and has_table_suffix(path.name)


def has_table_suffix(name: str) -> bool:
    """Whether a name has the suffix of a table file."""
    return name.lower().endswith(SUFFIXES)


def read(path: Path, wanted: Wanted) -> Columns:
    """Read the wanted columns of a table.

    Raises:
        DataError: the file is damaged, has no rows, or lacks a column; the message names the file, and if
            possible the row and the column.
    """
    return _format_of(path).read(path, wanted)


def first_rows(path: Path, count: int) -> list[Mapping[str, Any]]:
    """The first rows of a table, at most ``count``, each by column.

    Raises ``DataError`` if the file cannot be read.
    """
    return _format_of(path).first_rows(path, count)


def column_names(path: Path) -> tuple[str, ...]:
    """The names of a table's columns; of JSON, the keys of all objects.

    Raises ``DataError`` if the file cannot be read.
    """
    return _format_of(path).column_names(path)


def clients_in(path: Path) -> tuple[str, ...]:
    """The clients of a JSON object that holds the rows of each client; empty for other tables.

    Raises ``DataError`` if the file cannot be read.
    """
    return _format_of(path).clients(path)


def row_place(path: Path) -> Callable[[int], str]:
    """A function from a row's number, counted from 0, to a description of its place in the file."""
    return _format_of(path).place(path)


def client_row_place(path: Path, clients: Sequence[str]) -> Callable[[int], str]:
    """As `row_place`, for a JSON object of clients; ``clients`` has the client of every row."""
    first: dict[str, int] = {}
    for row, client in enumerate(clients):
        first.setdefault(client, row)

    def place(row: int) -> str:
        return (
            f"{path}: key {printable(clients[row])!r}, row {row - first[clients[row]] + 1} (counted from 1)"
        )

    return place


def _format_of(path: Path) -> Format:
    if path.is_dir():
        return _SAVED
    return next(one for suffix, one in _BY_SUFFIX.items() if path.name.lower().endswith(suffix))
