"""Read users' own tables: files, folders of files (`table_files`), and data sets of the Hugging Face hub."""

from __future__ import annotations

import ast
import glob
import io
import json
import math
import re
import tokenize
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsmoothlora.data import packages, splits, table_files
from fedsmoothlora.data.formats.base import Columns, Wanted, check_columns, reason
from fedsmoothlora.data.formats.json_rows import DECODER, Number, plain
from fedsmoothlora.data.formats.saved import of_dataset
from fedsmoothlora.data.leftovers import entries_in
from fedsmoothlora.data.numbers import number_in
from fedsmoothlora.data.splits import Splits
from fedsmoothlora.data.table_files import SUFFIXES, client_row_place, is_table, row_place
from fedsmoothlora.errors import DataError

if TYPE_CHECKING:  # it takes a second to import
    import datasets
    import pyarrow as pa

__all__ = [
    "KINDS",
    "Table",
    "Wanted",
    "declared_classes",
    "ignored",
    "is_table",
    "load_with",
    "read_hub_table",
    "read_table",
    "reason",
    "splits_in",
    "tables_in",
]

KINDS = SUFFIXES


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Rows of a file or of a hub data set, with all wanted columns.

    Attributes:
        columns: the wanted columns.
        place: a function from a row's number, counted from 0, to a description of its place, for messages.
        folder: the folder to which paths in the table are relative.
        file: the file's name, without ``.gz``; None for a hub data set.
        notes: notes for the user on the format of the file.
    """

    columns: Columns
    place: Callable[[int], str]
    folder: Path = Path()
    file: str | None = None
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """The number of rows."""
        return self.columns.length

    def file_of(self, row: int) -> str:
        """The file of a row; of a JSON object of clients, the file that its client would have alone."""
        clients = self.columns.clients
        return str(self.file) if clients is None else f"{clients[row]}.json"

    @cached_property
    def rows(self) -> datasets.Dataset:
        """The rows as a ``datasets.Dataset``, for columns of images; the cells are not copied."""
        import pyarrow as pa

        from fedsmoothlora.data.datasets_library import datasets

        cells = {name: _arrow(values) for name, values in self.columns.cells.items()}
        # Without a fingerprint, the library would read all cells to compute one.
        return datasets.Dataset(pa.table(cells).replace_schema_metadata(None), fingerprint="0" * 16)

    def texts(self, column: str, what: str) -> list[str]:
        """A column as text, without blanks around the text.

        Raises ``DataError`` with the place of a value that is missing, blank or not a single value; ``what``
        names the value in the message.
        """
        names = self.columns.classes.get(column)
        found = []
        for row, value in enumerate(self._cells(column)):
            if names is not None:
                value = self._named(row, column, value, names)
            if isinstance(value, list | dict | bytes):
                raise DataError(
                    f"{self.place(row)}, column {column!r}: holds {_kind(value)}; a {what} is one text or "
                    "number. Write one value in each row; lists of labels are for task.kind = 'multi-label' "
                    "and 'multi-label-image'"
                )
            found.append(_class_text(value) if what == "label" else _text(value))
        if None in found:
            row = found.index(None)
            count = found.count(None)
            raise DataError(
                f"{self.place(row)}, column {column!r}: the {what} is missing"
                + (f", as in {count - 1} rows after it" if count > 1 else "")
            )
        return [text for text in found if text is not None]

    def raw_texts(self, column: str) -> list[str]:
        """A column's unchanged text, empty if missing; a list of texts is joined with line breaks.

        Raises ``DataError`` with the place of a value that is not text.
        """
        found = []
        for row, value in enumerate(self._cells(column)):
            if isinstance(value, list) and all(
                isinstance(part, str) and not isinstance(part, Number) for part in value
            ):
                value = "\n".join(value)
            if isinstance(value, list | dict | bytes):
                raise DataError(f"{self.place(row)}, column {column!r}: holds {_kind(value)}, should be text")
            text = str(value) if isinstance(value, str) else _text(value) or ""
            if not text.isascii():
                self._check_unicode(row, column, text)
            found.append(text)
        return found

    def lists(self, column: str) -> list[tuple[str, ...]]:
        """A column of lists of texts. In text files, a list is written as JSON or as Python does.

        Raises ``DataError`` with the place of a value that is not a list of texts or numbers.
        """
        names = self.columns.classes.get(column)
        found = []
        for row, value in enumerate(self._cells(column)):
            parts = _list_in(value) if isinstance(value, str) else value
            if not isinstance(parts, list):
                what = "a text" if isinstance(value, str) else "nothing" if value is None else _kind(value)
                raise DataError(
                    f"{self.place(row)}, column {column!r}: holds {what}, should be a list such as "
                    '["one", "two"]; an empty list is []'
                )
            named = [self._named(row, column, part, names) for part in parts] if names is not None else parts
            if wrong := [
                part for part in named if _is_nan(part) or isinstance(part, list | dict | bytes | None)
            ]:
                what = _kind(wrong[0]) if isinstance(wrong[0], list | dict | bytes) else "nothing"
                raise DataError(
                    f"{self.place(row)}, column {column!r}: the list holds {what}, should hold texts"
                )
            texts = tuple(str(p) if type(p) is str else _class_text(p) or "" for p in named)
            for text in texts:
                self._check_unicode(row, column, text)
            found.append(texts)
        return found

    def json_texts(self, column: str) -> list[str]:
        """A column of lists and objects as JSON text; cells that are text already stay, empty if missing.

        Arrow gives all objects of a column the same keys, with null for those that a row does not have. So
        null keys of Arrow's objects are left out; those of JSON files were written by the user and stay.

        Raises ``DataError`` with the place of a value that is not text.
        """
        found, is_arrow = [], not isinstance(self.columns.cells[column], list)
        for row, value in enumerate(self._cells(column)):
            value = _without_null_keys(value) if is_arrow else value
            text = json.dumps(plain(value), ensure_ascii=False) if isinstance(value, list | dict) else value
            found.append("" if text is None else str(text))
            self._check_unicode(row, column, found[-1])
        return found

    def classes(self, column: str) -> tuple[str, ...] | None:
        """The order of classes that the data set declares for a column of labels, or of lists of labels.

        None if there is none.
        """
        return self.columns.classes.get(column)

    def _cells(self, column: str) -> Sequence[Any]:
        """A column as Python values."""
        cells = self.columns.cells[column]
        return cells if isinstance(cells, list) else _python(cells)

    def _named(self, row: int, column: str, value: Any, names: Sequence[str]) -> Any:
        """The name of a class that the data set declares; None if it is missing.

        A cell holds the number of the class, or its name. `datasets` stores unknown labels as -1, and a
        column of floats has NaN in rows without a label.

        Raises ``DataError`` with the place of a value that is neither.
        """
        if value is None or isinstance(value, list | dict | bytes):
            return value
        if isinstance(value, str) and value in names:
            return value
        if _is_nan(value):
            return None
        if isinstance(value, int | float) and float(value).is_integer() and value < len(names):
            return names[int(value)] if value >= 0 else None
        raise DataError(
            f"{self.place(row)}, column {column!r}: {value!r} is neither the number of a class, 0 to "
            f"{len(names) - 1}, nor one of the names that the file declares: {', '.join(names)}"
        )

    def _check_unicode(self, row: int, column: str, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.place(row)}, column {column!r}: {text[error.start]!r} is half of a character "
                "(an unpaired surrogate); remove it"
            ) from None


def declared_classes(tables: Sequence[Table], columns: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The order of classes that the data set declares, by column of labels or lists of labels.

    A column for which the tables declare nothing, or not the same, is missing.
    """
    found = {column: {table.classes(column) for table in tables} for column in columns}
    agreed = {column: orders.pop() for column, orders in found.items() if len(orders) == 1}
    return {column: names for column, names in agreed.items() if names is not None}


def tables_in(
    path: Path, split: str = splits.TRAIN, described: Callable[[], Collection[str]] = tuple
) -> tuple[list[Path], list[str]]:
    """The tables of one split of a path, and notes on files that were ignored.

    The path is a table or a folder of tables. If the names of the files do not name splits, all tables belong
    to every split. If a folder has no tables, those of its subfolder ``data`` are used, or those of its
    subfolders ``train``, ``test`` and the like.

    Args:
        path: the path.
        split: the split.
        described: gives the suffixes of files that tables name, such as images, which are not ignored.

    Raises:
        DataError: the file is not a table, or there are splits but not this one.
    """
    if path.is_file():
        if not is_table(path):
            raise DataError(f"{path}: unknown file type; should end in {', '.join(KINDS)}, or be a folder")
        return [path], []
    if is_table(path):
        return [path], []
    found = _tables_below(path)
    if by_split := splits.splits_by_name(path, found):
        found = list(splits.chosen(path, by_split, split))
    _refuse_copies(found)
    folders = {file.parent for file in found}
    # Folders beside tables usually contain the images that the tables name.
    others = [
        file
        for folder in sorted(folders)
        for file in entries_in(folder)
        if file.is_file() and not is_table(file)
    ]
    if others:
        suffixes = described()
        others = [file for file in others if file.suffix.lower() not in suffixes]
    return found, ignored(path, others, "tables") if found else []


def splits_in(path: Path) -> Splits:
    """The tables of each split of a folder; empty if the names of its files name no splits."""
    return splits.splits_by_name(path, _tables_below(path)) if path.is_dir() and not is_table(path) else {}


def _tables_below(folder: Path) -> list[Path]:
    inside = entries_in(folder)
    if found := [entry for entry in inside if is_table(entry)]:
        return found
    for subfolder in inside:
        if subfolder.name == "data" and subfolder.is_dir():
            return _tables_below(subfolder)
    named = [entry for entry in inside if entry.is_dir() and splits.splits_by_name(folder, [entry])]
    below = [entry for subfolder in named for entry in entries_in(subfolder)]
    # Other folders with names of splits contain images.
    found = [entry for entry in below if is_table(entry)]
    return found if all(entry in found or entry.suffix in (".md", ".txt") for entry in below) else []


def _refuse_copies(files: Sequence[Path]) -> None:
    packed = {file for file in files if file.suffix.lower() == ".gz"}
    for file in packed:
        if (unpacked := file.with_suffix("")) in files:
            raise DataError(
                f"{file}: {unpacked.name} is there too, probably with the same rows; keep one of them"
            )


def read_table(file: Path, wanted: Wanted) -> Table:
    """Read a file.

    Raises ``DataError`` if the file is wrong; the message names it, and if possible the row and the column.
    """
    columns = table_files.read(file, wanted)
    name = file.with_suffix("").name if file.suffix.lower() == ".gz" else file.name
    place = row_place(file) if columns.clients is None else client_row_place(file, columns.clients)
    return Table(columns=columns, place=place, folder=file.parent, file=name, notes=list(columns.notes))


def read_hub_table(
    source: str, revision: str | None, split: str, wanted: Wanted, subset: str | None = None
) -> Table:
    """Read a data set from the Hugging Face hub, or from the library's own cache.

    Raises ``DataError`` if it cannot be loaded, or lacks a column.
    """
    origin = f"{source} ({split})" if subset is None else f"{source}, {subset} ({split})"
    rows = _hub_rows(source, revision, split, subset)
    check_columns(origin, rows.column_names, wanted)
    if not len(rows):
        raise DataError(f"{origin}: there are no rows")
    return Table(
        columns=of_dataset(rows, wanted), place=lambda row: f"{origin}: row {row + 1} (counted from 1)"
    )


def hub_columns(source: str, revision: str | None, split: str, subset: str | None) -> tuple[str, ...]:
    """The names of the columns of a data set of the Hugging Face hub.

    Raises ``DataError`` if it cannot be loaded.
    """
    return tuple(_hub_rows(source, revision, split, subset).column_names)


def _hub_rows(source: str, revision: str | None, split: str, subset: str | None) -> datasets.Dataset:
    from fedsmoothlora.data.datasets_library import datasets

    try:
        with quietly():
            # With the library's own cache, which may have been copied to a machine without a network.
            return datasets.load_dataset(source, name=subset, revision=revision, split=split)
    except Exception as error:
        raise DataError(
            f"{source!r}, revision {revision or 'the newest'}, split {split!r}: there is no such file or "
            f"folder here, and it cannot be loaded from the Hugging Face hub: {reason(error)}"
        ) from None


def _arrow(cells: Any) -> pa.Array | pa.ChunkedArray:
    """A column as an Arrow array; numbers of JSON files become numbers, and cells of several types texts."""
    import pyarrow as pa

    if not isinstance(cells, list):
        return cells
    try:
        return pa.array([json.loads(cell) if isinstance(cell, Number) else cell for cell in cells])
    except (pa.ArrowException, OverflowError):
        return pa.array([None if cell is None else str(cell) for cell in cells])


def _python(cells: pa.ChunkedArray) -> list[Any]:
    """An Arrow column as Python values; floats of 16 and 32 bits are read by their shortest digits."""
    import numpy as np
    import pyarrow as pa

    values: list[Any] = cells.to_pylist()
    short = {pa.float16(): np.float16, pa.float32(): np.float32}.get(cells.type)
    if short is None:
        return values
    return [None if value is None else float(str(short(value))) for value in values]


def _without_null_keys(value: Any) -> Any:
    """A value without the null keys of its objects, at any depth; null elements of lists stay."""
    if isinstance(value, dict):
        return {key: _without_null_keys(part) for key, part in value.items() if part is not None}
    return [_without_null_keys(part) for part in value] if isinstance(value, list) else value


def _list_in(text: str) -> Any:
    """The list that a cell of a text file holds; None if it holds none."""
    try:
        return DECODER.decode(text)
    except (ValueError, RecursionError):
        pass
    try:
        found = ast.literal_eval(text.strip())  # as pandas writes lists: literals only, no code
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return None if _means_else(text) else found


def _means_else(text: str) -> bool:
    """Whether Python reads a list otherwise than it is meant.

    It joins texts without a comma between them, as NumPy writes arrays, and reads ``1_000`` as a number.
    """
    tokens = list(tokenize.generate_tokens(io.StringIO(text.strip()).readline))
    kinds = [token.type for token in tokens if token.type != tokenize.NL]
    joined = any(pair == (tokenize.STRING, tokenize.STRING) for pair in pairwise(kinds))
    return joined or any(t.type == tokenize.NUMBER and number_in(t.string) is None for t in tokens)


def _class_text(value: Any) -> str | None:
    """The name of a class as text; None if it is missing. The numbers 1.0 and 1 are the same class."""
    text = _text(value)
    if isinstance(value, Number) or not isinstance(value, str):
        return text and re.sub(r"(?<=\d)\.0+$", "", text)
    return text


def _text(value: Any) -> str | None:
    """A value as text; None if it is missing or blank."""
    if value is None or _is_nan(value):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    # In a column with missing values, whole numbers are stored as floats.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _kind(value: Any) -> str:
    names: dict[type, str] = {list: "a list", dict: "an object", bytes: "bytes"}
    return next(name for kind, name in names.items() if isinstance(value, kind))


def ignored(root: Path, others: Sequence[Path], kind: str) -> list[str]:
    """A note on the files below ``root`` that are not ``kind`` and were not read, if there are any."""
    if not others:
        return []
    files = "1 file is" if len(others) == 1 else f"{len(others)} files are"
    return [f"{root}: {files} of unknown type, not {kind}, and ignored; first: {others[0].relative_to(root)}"]


# -- the library -----------------------------------------------------------------------------------


def load_with(kind: str, path: Path, depth: int = 0, **options: Any) -> datasets.Dataset:
    """Read a file, or the files ``depth`` folders deep in a folder, with the library's builder ``kind``."""
    from fedsmoothlora.data.datasets_library import datasets

    pattern = "/".join([glob.escape(str(path)), *["*"] * (depth + 1 if depth else 0)])
    try:
        with quietly():
            return datasets.load_dataset(
                kind,
                data_files={"train": [pattern]},
                split="train",
                cache_dir=str(packages.cache_folder() / "datasets"),
                **options,
            )
    except Exception as error:  # an error of pandas, pyarrow or the library
        raise DataError(f"{path}: cannot be read as {kind}: {reason(error)}") from None


@contextmanager
def quietly() -> Iterator[None]:
    """Switch off the library's progress bars and log messages."""
    from fedsmoothlora.data.datasets_library import datasets

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
