"""Parquet files. Columns with the bytes of images are memory-mapped."""

from __future__ import annotations

import json
import mmap
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsmoothlora.data import packages
from fedsmoothlora.data.formats.base import Columns, Format, Wanted, check_columns, reason
from fedsmoothlora.errors import DataError

if TYPE_CHECKING:  # it takes long to import
    import pyarrow as pa


class Parquet(Format):
    """Columns with types of their own."""

    suffixes = (".parquet",)

    def read(self, path: Path, wanted: Wanted) -> Columns:
        import pyarrow as pa
        from pyarrow import parquet

        if not path.stat().st_size:
            raise DataError(f"{path}: the file is empty")
        try:
            with parquet.ParquetFile(path) as found:
                schema = found.schema_arrow
                check_columns(str(path), schema.names, wanted)
                if not found.metadata.num_rows:
                    raise DataError(f"{path}: there are column names but no rows")
                has_bytes = any(not _is_small(schema.field(name).type) for name in wanted)
                table = _spilled(found, list(wanted)) if has_bytes else found.read(list(wanted))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a Parquet file: {reason(error)}") from None
        return Columns(
            cells={name: table.column(name) for name in wanted},
            length=table.num_rows,
            classes=_declared_classes(schema.metadata or {}),
        )

    def first_rows(self, path: Path, count: int) -> list[Mapping[str, Any]]:
        from pyarrow import ArrowException, parquet

        try:
            with parquet.ParquetFile(path) as found:
                first = next(found.iter_batches(batch_size=count), None)
        except (ArrowException, OSError) as error:
            raise DataError(f"{path}: not a Parquet file: {reason(error)}") from None
        return [] if first is None else first.to_pylist()

    def column_names(self, path: Path) -> tuple[str, ...]:
        from pyarrow import ArrowException, parquet

        try:
            return tuple(parquet.read_schema(path).names)
        except (ArrowException, OSError) as error:
            raise DataError(f"{path}: not a Parquet file: {reason(error)}") from None


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
