"""The first rows of a table, to guess from: no check, no cache, no conversion."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from fedsmoothlora.data.table_files import has_clients
from fedsmoothlora.errors import DataError

ROWS = 1000
"""How many rows are looked at."""


def first_rows(file: Path) -> dict[str, list[Any]]:
    """The values of every named column in the first rows; None where a row has no value.

    Raises ``DataError`` if the file cannot be read.
    """
    try:
        rows = list(islice(_READERS[file.suffix.lower()](file), ROWS))
        names = dict.fromkeys(name for row in rows for name in row if name)
    except Exception as error:  # csv's, json's and pyarrow's, and rows that are no objects
        raise DataError(f"{file}: its first rows cannot be read: {error}") from None
    if not rows:
        raise DataError(f"{file}: there are no rows")
    return {name: [row.get(name) for row in rows] for name in names}


def _csv(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open(encoding="utf-8-sig", newline="") as text, _fields_of_any_length():
        yield from islice(csv.DictReader(text), ROWS)


@contextmanager
def _fields_of_any_length() -> Iterator[None]:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def clients_in(file: Path) -> int:
    """The number of clients of a JSON object that holds the rows of each client; 0 for other files."""
    return len(_rows_by_client(file) or ()) if file.suffix.lower() == ".json" else 0


def _rows_by_client(file: Path) -> dict[str, list[Mapping[str, Any]]] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError:  # several objects, one in each line
        return None
    return found if isinstance(found, dict) and has_clients(found, {}) else None


def _json(file: Path) -> Iterable[Mapping[str, Any]]:
    if file.suffix.lower() == ".json" and (by_client := _rows_by_client(file)) is not None:
        return chain.from_iterable(by_client.values())
    with file.open(encoding="utf-8-sig") as text:
        first = text.read(1024).lstrip()[:1]
        text.seek(0)
        if first == "[":
            rows: list[Mapping[str, Any]] = json.load(text)
            return rows
        return [json.loads(line) for line in islice(filter(str.strip, text), ROWS)]


def _parquet(file: Path) -> Iterator[Mapping[str, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        for batch in islice(table.iter_batches(batch_size=ROWS), 1):
            yield from batch.to_pylist()


def _conll(file: Path) -> Iterator[Mapping[str, Any]]:
    from fedsmoothlora.data.table_files import TAGS, TOKENS, read

    cells = read(file, {TOKENS: "task.tokens_column", TAGS: "task.tags_column"}).cells
    for words, tags in islice(zip(cells[TOKENS], cells[TAGS], strict=True), ROWS):
        yield {TOKENS: words, TAGS: tags}


_READERS: Mapping[str, Callable[[Path], Iterable[Mapping[str, Any]]]] = {
    ".csv": _csv,
    ".jsonl": _json,
    ".json": _json,
    ".parquet": _parquet,
    ".conll": _conll,
}
