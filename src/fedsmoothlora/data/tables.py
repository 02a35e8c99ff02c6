"""Users' own tables: CSV, JSONL and Parquet files and hub data sets, read with the library datasets."""

from __future__ import annotations

import csv
import difflib
import glob
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsmoothlora.data import packages
from fedsmoothlora.errors import DataError

if TYPE_CHECKING:  # it takes a second to import
    import datasets

# A column that is wanted, and the configuration's key that names it.
Wanted = Mapping[str, str]


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Rows of a file or of a hub data set; the wanted columns are there.

    Attributes:
        rows: the rows.
        place: where a row comes from, for people, by its number from 0.
        folder: where relative paths in it start.
        file: the file's name; None for a hub data set.
    """

    rows: datasets.Dataset
    place: Callable[[int], str]
    folder: Path = Path()
    file: str | None = None

    def texts(self, column: str, what: str) -> list[str]:
        """A column as text, blanks around it removed.

        Raises ``DataError`` that says where the ``what`` is missing or blank.
        """
        import datasets

        feature = self.rows.features[column]
        values = self.rows.select_columns([column])[:][column]
        if isinstance(feature, datasets.ClassLabel):
            # -1 stands for an unknown label there.
            values = [None if value is None or value < 0 else feature.int2str(value) for value in values]
        found = [_text(value) for value in values]
        if None in found:
            row = found.index(None)
            count = found.count(None)
            raise DataError(
                f"{self.place(row)}, column {column!r}: the {what} is missing"
                + (f", as in {count - 1} rows after it" if count > 1 else "")
            )
        return [text for text in found if text is not None]

    def raw_texts(self, column: str) -> list[str]:
        """A column's text as it is, empty where there is none; lists of texts have one a line.

        Raises ``DataError`` that says where there is something else than text.
        """
        found = []
        for row, value in enumerate(self.rows.select_columns([column])[:][column]):
            if isinstance(value, list) and all(isinstance(part, str) for part in value):
                value = "\n".join(value)
            if isinstance(value, list | dict | bytes):
                raise DataError(
                    f"{self.place(row)}, column {column!r}: holds {self.rows.features[column]}, "
                    "should be text"
                )
            found.append(value if isinstance(value, str) else _text(value) or "")
        return found

    def classes(self, column: str) -> tuple[str, ...] | None:
        """The order of classes that the data set itself gives to a column of labels; None if none."""
        import datasets

        feature = self.rows.features[column]
        return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def is_table(path: Path) -> bool:
    """Whether a file is of a kind that can be read."""
    return path.is_file() and path.suffix.lower() in KINDS


def tables_in(path: Path) -> tuple[list[Path], list[str]]:
    """The tables of a folder (a table itself is one), and what is noteworthy about other files there.

    Raises ``DataError`` for a file of unknown kind.
    """
    if path.is_file():
        if not is_table(path):
            raise DataError(f"{path}: of unknown kind; should end in {', '.join(KINDS)}, or be a folder")
        return [path], []
    found = [file for file in visible(path) if is_table(file)]
    # Folders beside tables usually hold the images that these name.
    others = [file for file in visible(path) if file.is_file() and file not in found]
    return found, ignored(path, others, "tables") if found else []


def read_table(file: Path, wanted: Wanted) -> Table:
    """Read a file.

    Raises ``DataError`` where it cannot be right; the message names the file, and the row and column if any.
    """
    return KINDS[file.suffix.lower()](file, wanted)


def read_hub_table(source: str, revision: str | None, split: str, wanted: Wanted) -> Table:
    """Read a data set of the Hugging Face hub, or what the library's own cache has of it.

    Raises ``DataError`` where it cannot be had, or lacks a column.
    """
    import datasets

    origin = f"{source} ({split})"
    try:
        with quietly():
            # The library's own cache, which a machine without a network may have been given.
            rows = datasets.load_dataset(source, revision=revision, split=split)
    except Exception as error:
        raise DataError(
            f"{source!r}, revision {revision or 'the newest'}, split {split!r}: there is no such file or "
            f"folder here, and it cannot be had from the Hugging Face hub: {reason(error)}"
        ) from None
    _check_columns(origin, rows.column_names, wanted)
    return _table(Table(rows=rows, place=lambda row: f"{origin}: row {row + 1} (counted from 1)"))


def _read_csv(file: Path, wanted: Wanted) -> Table:
    import datasets

    _check_utf8(file)
    with file.open(encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text)
        try:
            names = next(lines, [])
            if not names:
                raise DataError(f"{file}: the file is empty; should begin with a line of column names")
            _check_columns(str(file), names, wanted)
            number = 0
            for number, values in enumerate(filter(None, lines), 1):
                # pandas would move the columns instead, and only say so if not all rows are too long.
                if len(values) > len(names):
                    raise DataError(
                        f"{_csv_row(file, number)}: {len(values)} values for {len(names)} columns; "
                        "a value with a comma in it needs quotes"
                    )
        except csv.Error as error:
            raise DataError(f"{file}: line {lines.line_num} is not valid CSV: {error}") from None
    if not number:
        raise DataError(f"{file}: there are column names but no rows")
    # Text throughout: "007" is not 7, and "NA" may well be a name.
    features = datasets.Features(dict.fromkeys(names, datasets.Value("string")))
    table = load_with("csv", file, features=features, keep_default_na=False)
    return _local(table, file, lambda row: _csv_row(file, row + 1))


def _csv_row(file: Path, number: int) -> str:
    return f"{file}: row {number} (the header not counted)"


def _read_json(file: Path, wanted: Wanted) -> Table:
    _check_utf8(file)
    if not file.read_bytes().strip():
        raise DataError(f"{file}: the file is empty; should have a JSON object in each line")
    try:
        table = load_with("json", file)
    except ValueError:
        _explain_json(file)
        raise
    _check_columns(str(file), table.column_names, wanted)
    return _local(table, file, lambda row: f"{file}: row {row + 1} (counted from 1)")


def _explain_json(file: Path) -> None:
    """Raise ``DataError`` that names what the library does not: the first line that is not a JSON object."""
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}: line {error.lineno} is not valid JSON: {error}") from None
        return
    row, blank = 0, None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            blank = blank or number
            continue
        row += 1
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{file}: row {row} (line {number}) is not valid JSON: {error.msg} at column {error.colno}"
            ) from None
        if not isinstance(found, dict):
            raise DataError(f"{file}: row {row} (line {number}) is not a JSON object: {line[:40]}")
    if blank is not None and blank <= row:
        # The library passes over blank lines, but not where a column holds values of several types.
        raise DataError(f"{file}: line {blank} is blank; remove it")


def _read_parquet(file: Path, wanted: Wanted) -> Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        found = parquet.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        fault = "the file is empty" if not file.stat().st_size else f"not a Parquet file: {reason(error)}"
        raise DataError(f"{file}: {fault}") from None
    _check_columns(str(file), found.schema.to_arrow_schema().names, wanted)
    if not found.num_rows:
        raise DataError(f"{file}: there are column names but no rows")
    table = load_with("parquet", file, columns=list(wanted))
    return _local(table, file, lambda row: f"{file}: row {row + 1} (counted from 1)")


KINDS: dict[str, Callable[[Path, Wanted], Table]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _local(rows: datasets.Dataset, file: Path, place: Callable[[int], str]) -> Table:
    return _table(Table(rows=rows, place=place, folder=file.parent, file=file.name))


def _table(table: Table) -> Table:
    if not len(table.rows):
        raise DataError(f"{table.place(0)}: there are no rows")
    return table


def _text(value: Any) -> str | None:
    """A value as people write it; None if it is missing or blank."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    # Whole numbers become floats where a row of the column is missing.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def _check_columns(origin: str, found: Sequence[str], wanted: Wanted) -> None:
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


def _check_utf8(file: Path) -> None:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{file}: line {number} is not UTF-8 text (byte {line[error.start]:#04x} at place "
                    f"{error.start + 1} of the line); save the file with the encoding UTF-8"
                ) from None


def visible(folder: Path) -> list[Path]:
    """What a folder holds, without what the library passes over: names that begin with ``.`` or ``__``."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "__")))


def ignored(root: Path, others: Sequence[Path], kind: str) -> list[str]:
    """A note on the files below ``root`` that are none of ``kind`` and were not read, if there are any."""
    if not others:
        return []
    files = "1 file is" if len(others) == 1 else f"{len(others)} files are"
    return [f"{root}: {files} of unknown kind, not {kind}, and ignored; first: {others[0].relative_to(root)}"]


# -- the library -----------------------------------------------------------------------------------


def load_with(kind: str, path: Path, depth: int = 0, **options: Any) -> datasets.Dataset:
    """Read a file, or the files that lie ``depth`` folders deep in a folder, into our own cache."""
    import datasets

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
    except Exception as error:  # pandas', pyarrow's and its own
        raise DataError(f"{path}: cannot be read as {kind}: {reason(error)}") from None


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bars and no log of the library."""
    import datasets

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def reason(error: BaseException) -> str:
    """The first line of what the innermost error says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
