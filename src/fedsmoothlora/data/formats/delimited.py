"""CSV and TSV files. Their cells are texts."""

from __future__ import annotations

import csv
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from fedsmoothlora.data.formats.base import Columns, Format, Wanted, check_columns
from fedsmoothlora.data.formats.text import opened
from fedsmoothlora.errors import DataError

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


class _Delimited(Format):
    """A header, and a record of values for each row."""

    def place(self, path: Path) -> Callable[[int], str]:
        return _place(path)

    def column_names(self, path: Path) -> tuple[str, ...]:
        with _any_length():
            return tuple(_header(path, self._delimiter(path)))

    def first_rows(self, path: Path, count: int) -> list[Mapping[str, Any]]:
        with _any_length(), opened(path, newline="") as text:
            try:
                rows = csv.DictReader(
                    text, delimiter=self._delimiter(path), restkey=""
                )  # values without a name
                return [{name: value for name, value in row.items() if name} for row in islice(rows, count)]
            except csv.Error as error:
                raise _not_csv(path, error) from None

    @abstractmethod
    def _delimiter(self, path: Path) -> str:
        """The delimiter of the values."""


class Csv(_Delimited):
    """Values separated by commas, or by another delimiter that the header shows."""

    suffixes = (".csv", ".csv.gz")

    def read(self, path: Path, wanted: Wanted) -> Columns:
        with _any_length():
            try:
                delimiter = _delimiter(path, wanted)
                columns = _read_delimited(path, wanted, delimiter)
            except csv.Error as error:
                raise _not_csv(path, error) from None
        if delimiter == ",":
            return columns
        return _noted(columns, f"{path}: the values are separated by {_DELIMITERS[delimiter]}")

    def _delimiter(self, path: Path) -> str:
        return _delimiter(path, {})


class Tsv(_Delimited):
    """Values separated by tabs, with quotation marks around values or as part of them."""

    suffixes = (".tsv", ".tsv.gz")

    def read(self, path: Path, wanted: Wanted) -> Columns:
        with _any_length():
            try:
                return _read_delimited(path, wanted, "\t", strict=True)
            except (csv.Error, DataError) as error:
                try:
                    columns = _read_delimited(path, wanted, "\t", quoting=csv.QUOTE_NONE)
                except DataError:
                    raise (error if isinstance(error, DataError) else _not_csv(path, error)) from None
        return _noted(columns, f"{path}: quotation marks do not enclose values here, and are read as text")

    def _delimiter(self, path: Path) -> str:
        return "\t"


def _place(file: Path) -> Callable[[int], str]:
    return lambda row: f"{file}: row {row + 1} (the header not counted)"


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
    complete = (one for one, names in headers.items() if wanted and wanted.keys() <= set(names))
    return next(complete, max(headers, key=lambda delimiter: len(headers[delimiter])))


def _header(file: Path, delimiter: str) -> list[str]:
    with opened(file, newline="") as text:
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
    place, number = _place(file), 0
    with opened(file, newline="") as text:
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
