"""Users' own texts: tables and hub data sets with columns of text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.splits import TRAIN
from fedsmoothlora.data.tables import (
    KINDS,
    Table,
    Wanted,
    declared_classes,
    read_hub_table,
    read_table,
    tables_in,
)
from fedsmoothlora.data.texts import Texts
from fedsmoothlora.errors import DataError

Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class TextColumns:
    """The columns of a table that are read.

    Attributes:
        texts: columns of text, each with the configuration key that names it.
        json: those of the columns that hold lists and objects, read as JSON text.
        label: column of the label; None if rows have no label.
        client: column of the client that each row belongs to; None if it is not needed.
        where: keep only rows whose value in this column is among ``values``; None keeps all rows.
        values: see ``where``.
        lists: columns of lists of texts, each with the configuration key that names it.
    """

    texts: Wanted
    json: Collection[str] = ()
    label: str | None = None
    client: str | None = None
    where: str | None = None
    values: tuple[str, ...] = ()
    lists: Wanted = field(default_factory=dict)

    def keys(self) -> dict[str, str]:
        """The configuration key that names each column, by column."""
        named = {**self.texts, **self.lists}
        more = {
            self.label: "data.label_column",
            self.client: "partition.column",
            self.where: "data.where_column",
        }
        return named | {column: key for column, key in more.items() if column is not None}


@dataclass(frozen=True, kw_only=True, eq=False)
class TextRows:
    """Texts and the text of their labels, before the classes are known.

    Attributes:
        columns: each column's texts.
        labels: text of each row's label; None if rows have none.
        places: the file and the number of each row, for messages.
        label_column: the column of the labels.
        declared: the order of classes that the data set itself declares, by column of labels and of lists.
        clients: each row's value of the client column; None if it was not read.
        files: the file that each row is from (`Table.file_of`); None for a hub data set.
        lists: each column's lists of texts.
        notes: notes for the user.
    """

    columns: Mapping[str, Sequence[str]]
    labels: list[str] | None
    places: list[str]
    label_column: str | None
    declared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    clients: list[str] | None = None
    files: list[str] | None = None
    lists: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def labelled(self, labels: NDArray[np.int64], classes: tuple[str, ...]) -> Texts:
        """The texts with their classes' numbers."""
        return Texts(self.columns, labels, classes, self.places, self.lists)


def read_local(path: Path, columns: TextColumns, split: str = TRAIN) -> TextRows:
    """Read a table, or one split of a folder with one table per client.

    Raises:
        DataError: the data are wrong; the message names the file, and if possible the row and the column.
    """
    path = path.absolute()
    files, notes = tables_in(path, split)
    if not files:
        raise DataError(f"{path}: there is nothing to read; should hold files ending in {', '.join(KINDS)}")
    rows = _of_tables([read_table(file, columns.keys()) for file in files], columns)
    rows.notes.extend(notes)
    return rows


def read_hub(
    source: str, revision: str | None, split: str, columns: TextColumns, subset: str | None = None
) -> TextRows:
    """Read a data set from the Hugging Face hub, or from the library's own cache.

    Raises:
        DataError: the data set cannot be loaded, or its data are wrong.
    """
    return _of_tables([read_hub_table(source, revision, split, columns.keys(), subset)], columns)


def _of_tables(tables: Sequence[Table], columns: TextColumns) -> TextRows:
    kept = [_kept(table, columns) for table in tables]
    texts: dict[str, list[str]] = {name: [] for name in columns.texts}
    lists: dict[str, list[tuple[str, ...]]] = {name: [] for name in columns.lists}
    labels: list[str] = []
    clients: list[str] = []
    for table, rows in zip(tables, kept, strict=True):
        for name, values in texts.items():
            read = table.json_texts if name in columns.json else table.raw_texts
            values += _taken(read(name), rows)
        for name, found in lists.items():
            found += _taken(table.lists(name), rows)
        if columns.label is not None:
            labels += _taken(table.texts(columns.label, "label"), rows)
        if columns.client is not None:
            clients += _taken(table.texts(columns.client, "client"), rows)
    label = () if columns.label is None else (columns.label,)
    is_local = tables[0].file is not None
    return TextRows(
        columns=texts,
        labels=labels if columns.label is not None else None,
        places=[table.place(row) for table, rows in zip(tables, kept, strict=True) for row in rows],
        label_column=columns.label,
        declared=declared_classes(tables, [*label, *lists]),
        clients=clients if columns.client is not None else None,
        files=[table.file_of(row) for table, rows in zip(tables, kept, strict=True) for row in rows]
        if is_local
        else None,
        lists=lists,
        notes=[note for table in tables for note in table.notes],
    )


def _kept(table: Table, columns: TextColumns) -> list[int]:
    """The indices of the rows that ``columns.where`` keeps."""
    if columns.where is None:
        return list(range(len(table)))
    values = table.texts(columns.where, "value")
    rows = [row for row, value in enumerate(values) if value in columns.values]
    if not rows:
        found = sorted(set(values))
        raise DataError(
            f"{table.place(0)}: no row has a {columns.where!r} (data.where_column) among {columns.values} "
            f"(data.where_values); there are {', '.join(found[:10])}{' ...' if len(found) > 10 else ''}"
        )
    return rows


def _taken(values: Sequence[Value], rows: Sequence[int]) -> list[Value]:
    return [values[row] for row in rows]
