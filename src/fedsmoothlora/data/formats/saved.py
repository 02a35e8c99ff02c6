"""Rows of the library ``datasets``: folders that it has saved, and data sets that it has loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsmoothlora.data.formats.base import Columns, Format, Wanted, check_columns, reason
from fedsmoothlora.errors import DataError

if TYPE_CHECKING:  # it takes a second to import
    import datasets


class Saved(Format):
    """A folder written by ``Dataset.save_to_disk``, memory-mapped."""

    suffixes = ()

    def read(self, path: Path, wanted: Wanted) -> Columns:
        rows = _load(path)
        check_columns(str(path), rows.column_names, wanted)
        if not len(rows):
            raise DataError(f"{path}: there are no rows")
        return of_dataset(rows, wanted)

    def first_rows(self, path: Path, count: int) -> list[Mapping[str, Any]]:
        rows = _load(path)
        return rows.select(range(min(count, len(rows)))).with_format("arrow")[:].to_pylist()

    def column_names(self, path: Path) -> tuple[str, ...]:
        return tuple(_load(path).column_names)


def _load(folder: Path) -> datasets.Dataset:
    from fedsmoothlora.data.datasets_library import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # pyarrow's and the library's own
        raise DataError(f"{folder}: cannot be read as a saved data set: {reason(error)}") from None


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
