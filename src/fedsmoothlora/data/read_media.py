"""Users' own images and recordings: folders of files, and tables and hub data sets with a column of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.leftovers import entries_in, folders_in
from fedsmoothlora.data.split_names import is_split_alone, split_of
from fedsmoothlora.data.splits import TRAIN
from fedsmoothlora.data.stored_files import StoredFiles, check_regular
from fedsmoothlora.data.tables import (
    KINDS,
    Table,
    Wanted,
    declared_classes,
    ignored,
    read_hub_table,
    read_table,
    reason,
    tables_in,
)
from fedsmoothlora.errors import DataError

if TYPE_CHECKING:  # it takes a second to import
    import datasets

# Tables in a folder of files that describe the files: metadata files of the hub, and lists of classes.
_DESCRIPTIONS = {"metadata", "classes"}
# The column of the hub's metadata files that names the file.
_FILE_NAME = "file_name"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table that are read.

    Attributes:
        kind: the class of the rows: images or recordings.
        file: column of the file's path or bytes.
        label: column of the row's class; None if rows have none.
        client: column of the client that has the row; None if it is not needed.
        texts: further columns of text, each with the configuration key that names it.
        lists: columns of lists of texts, each with the configuration key that names it.
    """

    kind: type[StoredFiles]
    file: str
    label: str | None = "label"
    client: str | None = None
    texts: Wanted = field(default_factory=dict)
    lists: Wanted = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns of labels and of lists of labels."""
        return (*(() if self.label is None else (self.label,)), *self.lists)

    def keys(self) -> dict[str, str]:
        """The configuration key that names each column, by column."""
        more = {self.label: "data.label_column", self.client: "partition.column"}
        named = {self.file: f"data.{self.kind.item}_column", **self.texts, **self.lists}
        return named | {column: key for column, key in more.items() if column is not None}


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Files and the text of their labels, before the classes are known.

    Attributes:
        kind: the class of the rows: images or recordings.
        stored: a data set with one column of files, as `StoredFiles` has it.
        folder: the folder to which paths in it are relative.
        labels: text of each row's label; None if rows have none.
        places: the file, or the file and row, of each row, for messages.
        columns: the columns that were read; None for a folder of files.
        declared: the order of classes that the data set itself declares, by column of labels and of lists.
        clients: each row's value of the client column; None if it was not read.
        files: the table, or the client's folder, of each row; None if there is neither.
        texts: each further column's texts.
        lists: each further column's lists of texts.
        notes: notes for the user on the files that were read.
    """

    kind: type[StoredFiles]
    stored: datasets.Dataset
    folder: Path
    labels: list[str] | None
    places: list[str]
    columns: Columns | None
    declared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    clients: list[str] | None = None
    files: list[str] | None = None
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lists: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def label_column(self) -> str | None:
        """The column that the labels were read from; None for a folder of files."""
        return self.columns.label if self.columns else None

    def labelled(self, labels: NDArray[np.int64], classes: tuple[str, ...]) -> StoredFiles:
        """The files with their classes' numbers."""
        return self.kind(
            stored=self.stored,
            folder=self.folder,
            labels=labels,
            classes=classes,
            places=tuple(self.places),
            column=self.columns.file if self.columns else None,
            columns=self.texts,
            lists=self.lists,
        )


def read_local(path: Path, columns: Columns, split: str = TRAIN, without: Path | None = None) -> Rows:
    """Read a table, a folder with one table per client, or a folder of files (``class`` or ``client/class``).

    A folder with a ``metadata.csv`` (or ``.jsonl``, ``.parquet``) whose column ``file_name`` names the
    files, as on the hub, is read as a table, unless it has a folder for each class.

    Args:
        path: the file or folder.
        columns: the columns of tables.
        split: the split of a folder of tables that is read.
        without: a folder inside a folder of files that is not read.

    Raises:
        DataError: the data are wrong; the message names the file, and for a table the row and the column.
    """
    path = path.absolute()
    files, notes = tables_in(path, split, columns.kind.suffixes)
    if files and path.is_dir() and {file.name.partition(".")[0] for file in files} <= _DESCRIPTIONS:
        columns, files = _of_descriptions(path, files, columns)
    if not files:
        return _read_folder(path, columns, without)
    tables = [read_table(file, columns.keys()) for file in files]
    rows = _of_tables(tables, columns)
    rows.notes.extend([*(note for table in tables for note in table.notes), *notes])
    return rows


def _of_descriptions(root: Path, files: Sequence[Path], columns: Columns) -> tuple[Columns, list[Path]]:
    """The columns and tables to read if all tables in a folder may only describe its other files.

    Raises ``DataError`` if the folder has neither a table nor a folder of files for each class.
    """
    # Rows without a class cannot be in folders of classes.
    folders = 0 if columns.label is None else sum(entry.is_dir() for entry in entries_in(root))
    named = columns
    # A single folder does not tell classes apart: it may be that of the files that a table describes.
    if columns.file == columns.kind.item and folders < 2:
        named = replace(columns, file=_FILE_NAME)
    errors = []
    for tried in (columns, named):
        for file in files:
            try:
                read_table(file, tried.keys())
            except DataError as error:
                errors.append(error)
            else:
                return tried, [file]
    if not folders:
        raise errors[-1]
    return columns, []


def read_hub(
    source: str, revision: str | None, split: str, columns: Columns, subset: str | None = None
) -> Rows:
    """Read a data set from the Hugging Face hub, or from the library's own cache.

    Raises:
        DataError: the data set cannot be loaded, or its data are wrong.
    """
    return _from_table(read_hub_table(source, revision, split, columns.keys(), subset), columns)


def _of_tables(tables: Sequence[Table], columns: Columns) -> Rows:
    from fedsmoothlora.data.datasets_library import datasets

    parts = [_from_table(table, columns) for table in tables]
    return Rows(
        kind=columns.kind,
        stored=datasets.concatenate_datasets([part.stored for part in parts]),
        folder=tables[0].folder,
        labels=None if columns.label is None else [name for part in parts for name in part.labels or ()],
        places=[place for part in parts for place in part.places],
        columns=columns,
        declared=declared_classes(tables, columns.labels),
        clients=[client for part in parts for client in part.clients or ()] if columns.client else None,
        files=[
            table.file_of(row)
            for table, part in zip(tables, parts, strict=True)
            for row in range(len(part.places))
        ],
        texts={name: [text for part in parts for text in part.texts[name]] for name in columns.texts},
        lists={name: [one for part in parts for one in part.lists[name]] for name in columns.lists},
    )


def _from_table(table: Table, columns: Columns) -> Rows:
    kind = columns.kind
    try:
        stored = table.rows.select_columns([columns.file]).cast_column(columns.file, kind.feature())
    except Exception as error:  # the class of pyarrow's error depends on the column's content
        found = table.rows.features[columns.file]
        raise DataError(
            f"{table.place(0)}, column {columns.file!r}: has {found}, neither paths nor bytes of "
            f"{kind.plural}: {reason(error)}"
        ) from None
    return Rows(
        kind=kind,
        stored=stored if columns.file == kind.item else stored.rename_column(columns.file, kind.item),
        folder=table.folder,
        labels=None if columns.label is None else table.texts(columns.label, "label"),
        places=[table.place(row) for row in range(len(table))],
        columns=columns,
        declared=declared_classes([table], columns.labels),
        clients=table.texts(columns.client, "client") if columns.client else None,
        texts={name: table.raw_texts(name) for name in columns.texts},
        lists={name: table.lists(name) for name in columns.lists},
    )


# -- folders of files ------------------------------------------------------------------------------


def _read_folder(root: Path, columns: Columns, without: Path | None) -> Rows:
    from fedsmoothlora.data.datasets_library import datasets

    kind = columns.kind
    if columns.label is None:
        raise DataError(
            f"{root}: there is no table; should have a metadata.csv, .jsonl or .parquet with the labels "
            f"of the {kind.plural}, because a folder gives each of them one class only"
        )
    if columns.client:
        raise DataError(
            f"{root}: an {kind.item} folder has no column {columns.client!r} (partition.column); for one "
            f"folder per client, client/class/{kind.item}, set partition.kind = 'by_file'"
        )
    layout = _layout(root, kind, without)
    # Sorted as strings, so "a-b/1.png" comes before "a/1.png": partitions depend on the order of rows.
    paths = sorted(map(str, layout.files))
    return Rows(
        kind=kind,
        stored=datasets.Dataset.from_dict({kind.item: paths}).cast_column(kind.item, kind.feature()),
        folder=root,
        labels=[Path(path).parent.name for path in paths],
        places=paths,
        columns=None,
        files=[_file_like(Path(path).parts[-3]) for path in paths] if layout.has_clients else None,
        notes=ignored(root, layout.others, kind.plural),
    )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The files of a folder with a folder for each class.

    Attributes:
        has_clients: whether files are in ``client/class``, not in ``class``.
        files: the images or recordings.
        others: other files.
    """

    has_clients: bool
    files: list[Path]
    others: list[Path]


def _layout(root: Path, kind: type[StoredFiles], without: Path | None) -> _Layout:
    inside = _folders(root, without)
    if not inside:
        raise DataError(
            f"{root}: there is nothing to read; should have a folder of {kind.plural} for each class, or "
            f"files ending in {', '.join(KINDS)}"
        )
    _refuse_splits(root, inside)
    with_files = [folder for folder in inside if any(_is_of(kind, entry) for entry in entries_in(folder))]
    with_folders = [folder for folder in inside if _folders(folder, without)]
    if with_files and with_folders:
        raise DataError(
            f"{root}: {with_files[0].name} has {kind.plural} and {with_folders[0].name} has folders; "
            f"should be class/{kind.item} throughout, or client/class/{kind.item} throughout"
        )
    outside = [root]
    classes = inside
    if with_folders:
        outside += inside
        classes = []
        for client in inside:
            of_client = _folders(client, without)
            if not of_client:
                raise DataError(f"{client}: the client's folder has no class folder with {kind.plural}")
            _refuse_splits(client, of_client)
            classes += of_client
    others = [entry for folder in outside for entry in entries_in(folder) if not entry.is_dir()]
    if loose := next((entry for entry in others if _is_of(kind, entry)), None):
        raise DataError(f"{loose}: the {kind.item} is in no class folder")
    files = []
    for folder in classes:
        found, rest = _class_folder(folder, kind, without)
        files += found
        others += rest
    return _Layout(has_clients=bool(with_folders), files=files, others=others)


def _class_folder(
    folder: Path, kind: type[StoredFiles], without: Path | None
) -> tuple[list[Path], list[Path]]:
    """The images or recordings of a class, and its other files."""
    entries = entries_in(folder)
    if deeper := next(iter(_folders(folder, without)), None):
        raise DataError(f"{deeper}: a folder inside the class folder {folder.name}")
    if archive := next((entry for entry in entries if entry.suffix.lower() == ".zip"), None):
        raise DataError(f"{archive}: an archive among the {kind.plural}; unpack it, or move it elsewhere")
    files = [entry for entry in entries if _is_of(kind, entry)]
    known = set(files)
    others = [entry for entry in entries if entry not in known and not entry.is_dir()]
    if not files:
        raise DataError(f"{folder}: the class folder has no {kind.plural} ({len(others)} other files)")
    return files, others


def _refuse_splits(parent: Path, folders: Sequence[Path]) -> None:
    """Raise ``DataError`` if folders that would be read as classes or clients are splits.

    A single folder ``train`` beside other folders is accepted as a class: it may have pictures of trains.
    """
    splits = [folder.name for folder in folders if is_split_alone(folder.name)]
    if splits and splits != ["train"]:
        raise DataError(
            f"{parent}: {', '.join(splits)} look like splits of the data set, the other folders like classes "
            "or clients. Name the training data in data.source and the test data in data.test, or, if it "
            "is a class, rename it"
        )
    if len(folders) > 1 and all(split_of(folder.name) for folder in folders):
        names = ", ".join(folder.name for folder in folders)
        raise DataError(
            f"{parent}: the folders {names} look like parts of a data set, not like classes or clients; "
            "name one in data.source and another in data.test"
        )


def _folders(folder: Path, without: Path | None) -> list[Path]:
    left_out = None if without is None else without.resolve()
    return [entry for entry in folders_in(folder) if entry.resolve() != left_out]


def _is_of(kind: type[StoredFiles], path: Path) -> bool:
    """Whether a file is of a kind, by its suffix. Raises ``DataError`` for devices and broken links."""
    if path.suffix.lower() not in kind.suffixes() or path.is_dir():
        return False
    try:
        check_regular(path)
    except DataError as error:
        raise DataError(f"{path}: cannot be read as an {kind.item}: {error}") from None
    return True


def _file_like(folder: str) -> str:
    # `by_file` removes the last suffix of a name, but a dot in a folder's name does not begin a suffix.
    return f"{folder}.folder" if Path(folder).suffix else folder
