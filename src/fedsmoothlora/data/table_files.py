"""Readers of table files: CSV, TSV, JSON, JSON Lines, Parquet, CoNLL, and folders of ``save_to_disk``.

Readers do not guess types: a cell of a CSV file is text, and a number of a JSON file keeps its digits
(`Number`). Nothing is cached, so rows are always those of the file, and no copy of them remains on disk.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import mmap
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fedsmoothlora.data import packages
from fedsmoothlora.errors import DataError, RepeatedKeyError
from fedsmoothlora.printable import printable

if TYPE_CHECKING:  # they take long to import
    import datasets
    import pyarrow as pa

# The columns to read, each with the configuration key that names it.
Wanted = Mapping[str, str]

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
# JSON files beside the tables of a hub data set that have no rows.
_NO_TABLES = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}


_FIRST = 100  # objects of a JSON file whose keys name the columns
_TURN = {"role", "from"}  # a key of every turn of a chat


class Number(str):
    """A number of a JSON file, as it is written in the file."""

    __slots__ = ()


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


def is_table(path: Path) -> bool:
    """Whether a path is a table file, or a folder written by ``save_to_disk``."""
    if path.is_dir():
        return (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
    return path.is_file() and path.name not in _NO_TABLES and has_table_suffix(path.name)


def has_table_suffix(name: str) -> bool:
    """Whether a name has the suffix of a table file."""
    return name.lower().endswith(tuple(SUFFIXES))


def read(path: Path, wanted: Wanted) -> Columns:
    """Read the wanted columns of a table.

    Raises:
        DataError: the file is damaged, has no rows, or lacks a column; the message names the file, and if
            possible the row and the column.
    """
    if path.is_dir():
        return _read_saved(path, wanted)
    suffix = next(suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix))
    return SUFFIXES[suffix](path, wanted)


def column_names(path: Path) -> tuple[str, ...]:
    """The names of a table's columns; of JSON, those of the first objects.

    Raises ``DataError`` if the file cannot be read.
    """
    if path.is_dir():
        import datasets

        return tuple(datasets.load_from_disk(str(path)).column_names)
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".parquet"):
        from pyarrow import ArrowException, parquet

        try:
            return tuple(parquet.read_schema(path).names)
        except (ArrowException, OSError) as error:
            raise DataError(f"{path}: not a Parquet file: {reason(error)}") from None
    if name.endswith((".csv", ".tsv")):
        with _any_length():
            return tuple(_header(path, "\t" if name.endswith(".tsv") else _delimiter(path, {})))
    with _opened(path) as text:
        rows = islice(_objects(path, text, {}), _FIRST)
        return tuple(dict.fromkeys(key for _, row in rows for key in row))


def row_place(path: Path) -> Callable[[int], str]:
    """A function from a row's number, counted from 0, to a description of its place in the file."""
    if path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        return lambda row: f"{path}: row {row + 1} (the header not counted)"
    if path.name.lower().removesuffix(".gz").endswith(".conll"):
        return lambda row: f"{path}: sentence {row + 1} (counted from 1)"
    return lambda row: f"{path}: row {row + 1} (counted from 1)"


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


# -- text files --------------------------------------------------------------------------------------


@contextmanager
def _opened(file: Path, newline: str | None = None) -> Iterator[TextIO]:
    """The file's text, decompressed. Raises ``DataError`` if it is not UTF-8, or the archive is damaged."""
    try:
        with (
            gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb") as content,
            io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline) as text,
        ):
            yield text
    except UnicodeDecodeError:
        raise DataError(f"{file}: {_undecodable(file)}; save the file with the encoding UTF-8") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file}: cannot be decompressed, perhaps it is cut off: {error}") from None


def _undecodable(file: Path) -> str:
    """The place of the first byte that is not UTF-8."""
    with gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                utf16 = number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff"))
                return (
                    f"line {number} is not UTF-8 text (byte {line[error.start]:#04x} at place "
                    f"{error.start + 1} of the line{'; the file is probably UTF-16' if utf16 else ''})"
                )
    return "the file is not UTF-8 text"


# -- CSV and TSV -------------------------------------------------------------------------------------


def _read_csv(file: Path, wanted: Wanted) -> Columns:
    with _any_length():
        try:
            delimiter = _delimiter(file, wanted)
            columns = _read_delimited(file, wanted, delimiter)
        except csv.Error as error:
            raise _not_csv(file, error) from None
    if delimiter == ",":
        return columns
    return _noted(columns, f"{file}: the values are separated by {_DELIMITERS[delimiter]}")


def _read_tsv(file: Path, wanted: Wanted) -> Columns:
    with _any_length():
        try:
            return _read_delimited(file, wanted, "\t", strict=True)
        except (csv.Error, DataError) as error:
            try:
                columns = _read_delimited(file, wanted, "\t", quoting=csv.QUOTE_NONE)
            except DataError:
                raise (error if isinstance(error, DataError) else _not_csv(file, error)) from None
    return _noted(columns, f"{file}: quotation marks do not enclose values here, and are read as text")


def _not_csv(file: Path, error: csv.Error) -> DataError:
    return DataError(f"{file}: cannot be read as csv: {error}")


def _noted(columns: Columns, note: str) -> Columns:
    return Columns(cells=columns.cells, length=columns.length, notes=[note])


@contextmanager
def _any_length() -> Iterator[None]:
    """Accept fields of any length; the limit of the module ``csv`` is global and restored at the end."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _delimiter(file: Path, wanted: Wanted) -> str:
    """The delimiter that gives the header of a CSV file all wanted columns, or else the most columns."""
    headers = {delimiter: _header(file, delimiter) for delimiter in _DELIMITERS}
    complete = (delimiter for delimiter, names in headers.items() if wanted.keys() <= set(names))
    return next(complete, max(headers, key=lambda delimiter: len(headers[delimiter])))


def _header(file: Path, delimiter: str) -> list[str]:
    with _opened(file, newline="") as text:
        names = next(csv.reader(text, delimiter=delimiter), [])
    if any("\0" in name for name in names):
        raise DataError(
            f"{file}: line 1 has NUL characters; the file is probably UTF-16: save it with the encoding UTF-8"
        )
    return names


class _Lines:
    """An iterator over the lines of a text that appends each line to ``current``."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self.current: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._text)
        self.current.append(line)
        return line


def _read_delimited(
    file: Path, wanted: Wanted, delimiter: str, *, strict: bool = False, quoting: Any = csv.QUOTE_MINIMAL
) -> Columns:
    place, number = row_place(file), 0
    with _opened(file, newline="") as text:
        lines = _Lines(text)
        records = csv.reader(lines, delimiter=delimiter, strict=strict, quoting=quoting)
        names = next(records, [])
        if not names:
            raise DataError(f"{file}: the file is empty; should begin with a line of column names")
        check_columns(str(file), names, wanted)
        cells: dict[str, list[str]] = {name: [] for name in wanted}
        at = {name: names.index(name) for name in wanted}
        begin, last = 0, lines.current
        lines.current = []
        for values in records:
            begin, last, lines.current = records.line_num - len(lines.current) + 1, lines.current, []
            if not values or (len(values) == 1 < len(names) and not values[0].strip()):
                continue  # a blank line
            if len(values) != len(names):
                _refuse_open_quote(file, last, begin, delimiter, quoting)
                _check_width(place(number), values, names, at, delimiter)
            for name, column in at.items():
                cells[name].append(values[column])
            number += 1
    _refuse_open_quote(file, last, begin, delimiter, quoting)
    if not number:
        raise DataError(f"{file}: there are column names but no rows")
    return Columns(cells=cells, length=number)


def _check_width(
    place: str, values: Sequence[str], names: Sequence[str], at: Mapping[str, int], delimiter: str
) -> None:
    """Raise ``DataError`` for a row with too many values, or without the value of a wanted column."""
    counts = f"{len(values)} {'value' if len(values) == 1 else 'values'} for {len(names)} columns"
    if len(values) > len(names):
        raise DataError(
            f"{place}: {counts}; a value with {'a tab' if delimiter == chr(9) else repr(delimiter)} in it "
            "needs quotes"
        )
    for name, column in at.items():
        if column >= len(values):
            raise DataError(
                f"{place}: {counts}: column {name!r} is missing; a value with a line break in it needs quotes"
            )


def _refuse_open_quote(file: Path, record: Sequence[str], line: int, delimiter: str, quoting: int) -> None:
    """Raise ``DataError`` if a quotation mark in the record that begins on ``line`` is never closed."""
    if quoting == csv.QUOTE_NONE:
        return
    try:
        list(csv.reader(record, delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            raise DataError(
                f"{file}: cannot be read as csv: a quotation mark in the row that begins on line {line} is "
                "never closed"
            ) from None


# -- CoNLL -------------------------------------------------------------------------------------------

# The columns of a CoNLL file: the first and the last of its lines.
TOKENS, TAGS = "tokens", "tags"
_NEW_DOCUMENT = "-DOCSTART-"


def _read_conll(file: Path, wanted: Wanted) -> Columns:
    """Sentences with a word and its tag in each line, and blank lines between them.

    Columns are separated by tabs or spaces. The first one is the word, the last one the tag (CoNLL-2003 has
    two others between them). Lines with ``-DOCSTART-`` are left out.
    """
    check_columns(str(file), [TOKENS, TAGS], wanted)
    cells: dict[str, list[list[str]]] = {TOKENS: [], TAGS: []}
    width, inside = 0, False
    with _opened(file) as text:
        for number, line in enumerate(text, 1):
            values = [value.strip() for value in line.split("\t")] if "\t" in line else line.split()
            if not any(values) or values[0] == _NEW_DOCUMENT:
                inside = False
                continue
            width = width or len(values)
            if len(values) != width or width < 2:
                raise DataError(
                    f"{file}: line {number} has {len(values)} columns, should have "
                    + (f"{width} like the lines before" if width >= 2 else "a word and its tag")
                )
            if not inside:
                for sentences in cells.values():
                    sentences.append([])
                inside = True
            cells[TOKENS][-1].append(values[0])
            cells[TAGS][-1].append(values[-1])
    if not cells[TOKENS]:
        raise DataError(f"{file}: there are no sentences")
    return Columns(cells={name: cells[name] for name in wanted}, length=len(cells[TOKENS]))


# -- JSON --------------------------------------------------------------------------------------------


def _read_json(file: Path, wanted: Wanted) -> Columns:
    cells: dict[str, list[Any]] = {name: [] for name in wanted}
    names: dict[str, None] = {}  # in the order of their first occurrence
    clients: list[str] = []
    number = 0
    with _opened(file) as text:
        for client, row in _objects(file, text, wanted):
            names.update(dict.fromkeys(row))
            for name, values in cells.items():
                values.append(row.get(name))
            if client is not None:
                clients.append(client)
            number += 1
    if not number:
        raise DataError(f"{file}: the file is empty; should have a JSON object in each line")
    check_columns(str(file), list(names), wanted)
    if not clients:
        return Columns(cells=cells, length=number)
    note = (
        f"{file}: one JSON object with the rows of {len(set(clients))} clients (partition.kind = 'by_file')"
    )
    return Columns(cells=cells, length=number, notes=[note], clients=clients)


# A row of a JSON file, and the client that it belongs to, if the file has clients.
_Row = tuple[str | None, dict[str, Any]]


def _objects(file: Path, text: TextIO, wanted: Wanted) -> Iterator[_Row]:
    """The objects of JSON Lines, of a JSON array, or of one JSON object of clients.

    Args:
        file: the file, for errors.
        text: its content.
        wanted: the wanted columns, which tell a row from an object of clients; empty if they are not known.
    """
    lines = ((number, line) for number, line in enumerate(text, 1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    number, line = first
    if line.lstrip().startswith("["):
        for found in _array(file, "\n" * (number - 1) + line + text.read()):
            yield None, found
        return
    try:
        row = _row(file, 1, number, line)
    except DataError as error:  # perhaps the first line of a longer object
        found = _whole_object(file, "\n" * (number - 1) + line + text.read(), error)
        if not has_clients(found, wanted):
            raise error from None
        yield from _rows_of_clients(file, found)
        return
    second = next(lines, None)
    if second is None and has_clients(row, wanted):
        yield from _rows_of_clients(file, row)
        return
    yield None, row
    for count, (number, line) in enumerate(lines if second is None else chain([second], lines), 2):
        yield None, _row(file, count, number, line)


def _row(file: Path, count: int, number: int, line: str) -> dict[str, Any]:
    """The object of a line of JSON Lines; ``count`` and ``number`` are those of the row and the line."""
    where = f"{file}: row {count} (line {number})"
    try:
        found = DECODER.decode(line)
    except json.JSONDecodeError as error:
        if count == 1 and line.strip() == "{":
            raise DataError(
                f"{where} is not valid JSON by itself; should be one object in each line, or an array of "
                "objects, or one object with a list of rows for each client"
            ) from None
        raise DataError(f"{where} is not valid JSON: {error.msg} at column {error.colno}") from None
    except (RepeatedKeyError, RecursionError) as error:
        raise DataError(f"{where}: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{where} is not a JSON object: {line[:40].rstrip()}")
    return found


def _whole_object(file: Path, text: str, error: DataError) -> dict[str, Any]:
    """The object that a whole file is. Raises ``error`` unless the file is an object of several lines."""
    try:
        found = DECODER.decode(text)
    except json.JSONDecodeError as wrong:
        if text.lstrip().partition("\n")[0].strip() == "{" and wrong.lineno > 1:
            raise DataError(
                f"{file}: line {wrong.lineno} is not valid JSON: {wrong.msg} at column {wrong.colno}"
            ) from None
        raise error from None
    except (RepeatedKeyError, RecursionError) as wrong:
        if len(text.strip().splitlines()) == 1:
            raise error from None  # it names the line
        raise DataError(f"{file}: {wrong}") from None
    if not isinstance(found, dict):
        raise error
    return found


def has_clients(found: Mapping[str, Any], wanted: Wanted) -> bool:
    """Whether an object holds the rows of clients, by the client's name, rather than being one row.

    Its values are lists of objects that are not the turns of a chat, and its keys are not the wanted columns.
    A value of another kind is a fault if the columns are known, and otherwise shows a row.
    """
    rows = [
        value
        for value in found.values()
        if isinstance(value, list) and any(isinstance(row, dict) and not row.keys() & _TURN for row in value)
    ]
    return bool(rows) and not wanted.keys() & found.keys() if wanted else len(rows) == len(found) > 0


def _rows_of_clients(file: Path, found: Mapping[str, Any]) -> Iterator[_Row]:
    """The rows of an object of clients, each with its client.

    Raises ``DataError`` that names the key of a value that is not a list of rows.
    """
    for client, rows in found.items():
        where = f"{file}: key {printable(client)!r}"
        if not client.strip() or "/" in client:
            raise DataError(f"{where} names a client, so it should be a text without '/'")
        if not isinstance(rows, list):
            raise DataError(f"{where} holds {printable(str(rows))[:40]}; should be a list of rows, as others")
        if not rows:
            raise DataError(f"{where} has no rows; leave it out")
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise DataError(f"{where}, row {number} is not a JSON object: {printable(str(row))[:40]}")
            yield client, row


def _array(file: Path, text: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON array, decoded one by one, since the whole array would need much more memory."""
    end = len(text)
    at = _blank(text, text.index("[") + 1)
    row = 0
    try:
        while at < end and text[at] != "]":
            row += 1
            found, at = DECODER.raw_decode(text, at)
            if not isinstance(found, dict):
                raise DataError(f"{file}: row {row} (counted from 1) is not a JSON object: {str(found)[:40]}")
            yield found
            at = _blank(text, at)
            if text[at : at + 1] == ",":
                at = _blank(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("expecting ',' or ']'", text, at)
        if at >= end or _blank(text, at + 1) < end:
            raise json.JSONDecodeError("expecting the end of the array and nothing after it", text, at)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {error.lineno} is not valid JSON: {error}") from None
    except (RepeatedKeyError, RecursionError) as error:
        raise DataError(f"{file}: row {row} (counted from 1): {error}") from None


def _blank(text: str, at: int) -> int:
    """The index of the first character at or after ``at`` that is not blank."""
    match = json.decoder.WHITESPACE.match(text, at)  # type: ignore[attr-defined]
    return int(match.end())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"the key {repeated!r} is there twice")
    return found


DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=Number,
    parse_float=Number,
    parse_constant=lambda name: None if name == "NaN" else Number(name),
)


# -- Arrow -------------------------------------------------------------------------------------------


def _read_parquet(file: Path, wanted: Wanted) -> Columns:
    import pyarrow as pa
    from pyarrow import parquet

    if not file.stat().st_size:
        raise DataError(f"{file}: the file is empty")
    try:
        with parquet.ParquetFile(file) as found:
            schema = found.schema_arrow
            check_columns(str(file), schema.names, wanted)
            if not found.metadata.num_rows:
                raise DataError(f"{file}: there are column names but no rows")
            has_bytes = any(not _is_small(schema.field(name).type) for name in wanted)
            table = _spilled(found, list(wanted)) if has_bytes else found.read(list(wanted))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file}: not a Parquet file: {reason(error)}") from None
    return Columns(
        cells={name: table.column(name) for name in wanted},
        length=table.num_rows,
        classes=_declared_classes(schema.metadata or {}),
    )


def _is_small(kind: pa.DataType) -> bool:
    """Whether a column has texts or numbers, rather than the bytes of images."""
    import pyarrow as pa

    return not (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_struct(kind)
    )


def _spilled(found: Any, names: list[str]) -> pa.Table:
    """Copy columns to a memory-mapped temporary file, because images can be larger than the memory.

    The file is unlinked, or deleted when it is closed, so that nothing remains on disk after the process.
    """
    import pyarrow as pa

    folder = packages.cache_folder() / "scratch"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        with pa.ipc.new_stream(file, pa.schema([found.schema_arrow.field(name) for name in names])) as stream:
            for batch in found.iter_batches(batch_size=64, columns=names):
                stream.write_batch(batch.select(names))
        file.flush()
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_stream(pa.py_buffer(content)).read_all()


def _declared_classes(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """The class names that ``datasets`` writes into the metadata of a Parquet file, by column.

    A column of lists has those of the lists' elements.
    """
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        elements = {
            column: feature["feature"] if isinstance(feature, dict) and "feature" in feature else feature
            for column, feature in features.items()
        }
        return {
            column: tuple(map(str, feature["names"]))
            for column, feature in elements.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _read_saved(folder: Path, wanted: Wanted) -> Columns:
    """Memory-map a folder written by ``Dataset.save_to_disk``."""
    from fedsmoothlora.data.datasets_library import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow's and the library's own
        raise DataError(f"{folder}: cannot be read as a saved data set: {reason(error)}") from None
    check_columns(str(folder), rows.column_names, wanted)
    if not len(rows):
        raise DataError(f"{folder}: there are no rows")
    return of_dataset(rows, wanted)


def of_dataset(rows: datasets.Dataset, wanted: Wanted) -> Columns:
    """The wanted columns of a ``datasets.Dataset``, which must have them."""
    from fedsmoothlora.data.datasets_library import datasets

    table = rows.select_columns(list(wanted)).with_format("arrow")[:]
    # A column of lists has the classes of the lists' elements.
    elements = {name: getattr(rows.features[name], "feature", rows.features[name]) for name in wanted}
    return Columns(
        cells={name: table.column(name) for name in wanted},
        length=len(rows),
        classes={
            name: tuple(element.names)
            for name, element in elements.items()
            if isinstance(element, datasets.ClassLabel)
        },
    )


SUFFIXES: dict[str, Callable[[Path, Wanted], Columns]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".tsv": _read_tsv,
    ".csv.gz": _read_csv,
    ".tsv.gz": _read_tsv,
    ".jsonl.gz": _read_json,
    ".json.gz": _read_json,
    ".conll": _read_conll,
    ".conll.gz": _read_conll,
}
