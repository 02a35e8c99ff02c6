"""JSON Lines, JSON arrays of objects, and JSON objects with the rows of each client.

A number keeps its digits (`Number`), so that a label such as 1.10 is not changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from fedsmoothlora.data.formats.base import Columns, Format, Wanted, check_columns
from fedsmoothlora.data.formats.text import opened
from fedsmoothlora.errors import DataError, RepeatedKeyError
from fedsmoothlora.printable import printable

_TURN = {"role", "from"}  # a key of every turn of a chat


class Number(str):
    """A number of a JSON file, as it is written in the file."""

    __slots__ = ()


def plain(value: Any) -> Any:
    """A cell with numbers in place of the text of their digits."""
    if isinstance(value, Number):
        return json.loads(value)
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list) else value


class Json(Format):
    """One object in each line, an array of objects, or an object with a list of rows for each client."""

    suffixes = (".jsonl", ".json", ".jsonl.gz", ".json.gz")

    def read(self, path: Path, wanted: Wanted) -> Columns:
        cells: dict[str, list[Any]] = {name: [] for name in wanted}
        names: dict[str, None] = {}  # in the order of their first occurrence
        clients: list[str] = []
        number = 0
        with opened(path) as text:
            for client, row in _objects(path, text, wanted):
                names.update(dict.fromkeys(row))
                for name, values in cells.items():
                    values.append(row.get(name))
                if client is not None:
                    clients.append(client)
                number += 1
        if not number:
            raise DataError(f"{path}: the file is empty; should have a JSON object in each line")
        check_columns(str(path), list(names), wanted)
        if not clients:
            return Columns(cells=cells, length=number)
        count = len(set(clients))
        note = f"{path}: one JSON object with the rows of {count} clients (partition.kind = 'by_file')"
        return Columns(cells=cells, length=number, notes=[note], clients=clients)

    def first_rows(self, path: Path, count: int) -> list[Mapping[str, Any]]:
        with opened(path) as text:
            return [plain(row) for _, row in islice(_objects(path, text, {}), count)]

    def column_names(self, path: Path) -> tuple[str, ...]:
        """The keys of all rows, since a key may be missing in the first ones."""
        with opened(path) as text:
            return tuple(dict.fromkeys(name for _, row in _objects(path, text, {}) for name in row))

    def clients(self, path: Path) -> tuple[str, ...]:
        with opened(path) as text:
            rows = _objects(path, text, {})
            first = next(rows, (None, {}))
            if first[0] is None:
                return ()
            return tuple(dict.fromkeys(str(client) for client, _ in chain([first], rows)))


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
        if not _has_clients(found, wanted):
            raise error from None
        yield from _rows_of_clients(file, found)
        return
    second = next(lines, None)
    if second is None and _has_clients(row, wanted):
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


def _has_clients(found: Mapping[str, Any], wanted: Wanted) -> bool:
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
