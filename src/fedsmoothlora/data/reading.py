"""Users' own labelled images: folders, tables and hub data sets, read with the library datasets."""

from __future__ import annotations

import csv
import difflib
import glob
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsmoothlora import packages

if TYPE_CHECKING:  # it takes a second to import
    import datasets

# Folders that name a part of a data set, and so neither a class nor a client.
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table that are wanted.

    Attributes:
        image: the image's path or bytes.
        label: its class.
        client: whose it is; None if nobody asks.
    """

    image: str = "image"
    label: str = "label"
    client: str | None = None

    def keys(self) -> dict[str, str]:
        """The configuration key that names each column, by column."""
        named = {self.image: "data.image_column", self.label: "data.label_column"}
        return named | ({self.client: "partition.column"} if self.client else {})


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Images and the text of their labels, before the classes are known.

    Attributes:
        stored: one column, ``image``, of the feature ``datasets.Image(decode=False)``.
        folder: where relative paths in it start.
        labels: text of each row's label.
        places: where each row comes from, for people.
        columns: the columns that they were read from; None for an image folder.
        published: the order of classes that the data set itself gives; None if it gives none.
        clients: each row's value of the client column; None if it was not asked for.
        files: the file, or the client's folder, that each row is from; None if there is no such thing.
        notes: what people should know.
    """

    stored: datasets.Dataset
    folder: Path
    labels: list[str]
    places: list[str]
    columns: Columns | None
    published: tuple[str, ...] | None = None
    clients: list[str] | None = None
    files: list[str] | None = None
    notes: list[str] = field(default_factory=list)


def read_local(path: Path, columns: Columns) -> Rows:
    """Read a table, a folder of tables (one a client), or an image folder (``class`` or ``client/class``).

    Raises:
        ValueError: the data cannot be right; the message names the file, and the row and column if it has.
    """
    path = path.absolute()
    if path.is_file():
        if path.suffix.lower() not in _KINDS:
            raise ValueError(f"{path}: of unknown kind; should end in {', '.join(_KINDS)}, or be a folder")
        return _read_tables([path], columns)
    tables = [file for file in _visible(path) if file.is_file() and file.suffix.lower() in _KINDS]
    if not tables:
        return _read_image_folder(path, columns)
    # Folders beside tables usually hold the images that these name.
    others = [file for file in _visible(path) if file.is_file() and file not in tables]
    rows = _read_tables(tables, columns)
    rows.notes.extend(_ignored(path, others, "tables"))
    return rows


def read_hub(source: str, revision: str | None, split: str, columns: Columns) -> Rows:
    """Read a data set of the Hugging Face hub, or what the library's own cache has of it.

    Raises:
        ValueError: it cannot be had, or its data cannot be right.
    """
    import datasets

    origin = f"{source} ({split})"
    try:
        with _quietly():
            # The library's own cache, which a machine without a network may have been given.
            table = datasets.load_dataset(source, revision=revision, split=split)
    except Exception as error:
        raise ValueError(
            f"{source!r}, revision {revision or 'the newest'}, split {split!r}: there is no such file or "
            f"folder here, and it cannot be had from the Hugging Face hub: {_reason(error)}"
        ) from None
    _check_columns(origin, table.column_names, columns)
    return _from_table(table, Path(), lambda row: f"{origin}: row {row + 1} (counted from 1)", columns)


# -- tables ----------------------------------------------------------------------------------------


def _read_tables(files: Sequence[Path], columns: Columns) -> Rows:
    import datasets

    parts = [_KINDS[file.suffix.lower()](file, columns) for file in files]
    published = {part.published for part in parts}
    return Rows(
        stored=datasets.concatenate_datasets([part.stored for part in parts]),
        folder=files[0].parent,
        labels=[label for part in parts for label in part.labels],
        places=[place for part in parts for place in part.places],
        columns=columns,
        published=published.pop() if len(published) == 1 else None,
        clients=[client for part in parts for client in part.clients or ()] if columns.client else None,
        files=[file.name for file, part in zip(files, parts, strict=True) for _ in part.labels],
    )


def _read_csv(file: Path, columns: Columns) -> Rows:
    import datasets

    _check_utf8(file)
    with file.open(encoding="utf-8-sig", newline="") as text:
        lines = csv.reader(text)
        try:
            names = next(lines, [])
            if not names:
                raise ValueError(f"{file}: the file is empty; should begin with a line of column names")
            _check_columns(str(file), names, columns)
            number = 0
            for number, values in enumerate(filter(None, lines), 1):
                # pandas would move the columns instead, and only say so if not all rows are too long.
                if len(values) > len(names):
                    raise ValueError(
                        f"{_csv_row(file, number)}: {len(values)} values for {len(names)} columns; "
                        "a value with a comma in it needs quotes"
                    )
        except csv.Error as error:
            raise ValueError(f"{file}: line {lines.line_num} is not valid CSV: {error}") from None
    if not number:
        raise ValueError(f"{file}: there are column names but no rows")
    # Text throughout: "007" is not 7, and "NA" may well be a name.
    features = datasets.Features(dict.fromkeys(names, datasets.Value("string")))
    table = _load("csv", file, features=features, keep_default_na=False)
    return _from_table(table, file.parent, lambda row: _csv_row(file, row + 1), columns)


def _csv_row(file: Path, number: int) -> str:
    return f"{file}: row {number} (the header not counted)"


def _read_json(file: Path, columns: Columns) -> Rows:
    _check_utf8(file)
    if not file.read_bytes().strip():
        raise ValueError(f"{file}: the file is empty; should have a JSON object in each line")
    try:
        table = _load("json", file)
    except ValueError:
        _explain_json(file)
        raise
    _check_columns(str(file), table.column_names, columns)
    return _from_table(table, file.parent, lambda row: f"{file}: row {row + 1} (counted from 1)", columns)


def _explain_json(file: Path) -> None:
    """Raise ``ValueError`` that names what the library does not: the first line that is not a JSON object."""
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: line {error.lineno} is not valid JSON: {error}") from None
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
            raise ValueError(
                f"{file}: row {row} (line {number}) is not valid JSON: {error.msg} at column {error.colno}"
            ) from None
        if not isinstance(found, dict):
            raise ValueError(f"{file}: row {row} (line {number}) is not a JSON object: {line[:40]}")
    if blank is not None and blank <= row:
        # The library passes over blank lines, but not where a column holds values of several types.
        raise ValueError(f"{file}: line {blank} is blank; remove it")


def _read_parquet(file: Path, columns: Columns) -> Rows:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        found = parquet.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        reason = "the file is empty" if not file.stat().st_size else f"not a Parquet file: {_reason(error)}"
        raise ValueError(f"{file}: {reason}") from None
    _check_columns(str(file), found.schema.to_arrow_schema().names, columns)
    if not found.num_rows:
        raise ValueError(f"{file}: there are column names but no rows")
    table = _load("parquet", file, columns=list(columns.keys()))
    return _from_table(table, file.parent, lambda row: f"{file}: row {row + 1} (counted from 1)", columns)


_KINDS: dict[str, Callable[[Path, Columns], Rows]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _from_table(table: datasets.Dataset, folder: Path, place: Callable[[int], str], columns: Columns) -> Rows:
    import datasets

    if not len(table):
        raise ValueError(f"{place(0)}: there are no rows")
    try:
        stored = table.select_columns([columns.image]).cast_column(
            columns.image, datasets.Image(decode=False)
        )
    except Exception as error:  # pyarrow's, by what the column holds
        kind = table.features[columns.image]
        raise ValueError(
            f"{place(0)}, column {columns.image!r}: holds {kind}, neither paths nor bytes of images: "
            f"{_reason(error)}"
        ) from None
    feature = table.features[columns.label]
    return Rows(
        stored=stored if columns.image == "image" else stored.rename_column(columns.image, "image"),
        folder=folder,
        labels=_texts(table, columns.label, place, "label"),
        places=[place(row) for row in range(len(table))],
        columns=columns,
        published=tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None,
        clients=_texts(table, columns.client, place, "client") if columns.client else None,
    )


def _texts(table: datasets.Dataset, column: str, place: Callable[[int], str], what: str) -> list[str]:
    """A column as text; there is some in every row."""
    import datasets

    feature = table.features[column]
    values = table.select_columns([column])[:][column]
    if isinstance(feature, datasets.ClassLabel):
        # -1 stands for an unknown label there.
        values = [None if value is None or value < 0 else feature.int2str(value) for value in values]
    found = [_text(value) for value in values]
    if None in found:
        row = found.index(None)
        count = found.count(None)
        raise ValueError(
            f"{place(row)}, column {column!r}: the {what} is missing"
            + (f", as in {count - 1} rows after it" if count > 1 else "")
        )
    return [text for text in found if text is not None]


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


def _check_columns(origin: str, found: Sequence[str], columns: Columns) -> None:
    for column, key in columns.keys().items():
        if column not in found:
            close = difflib.get_close_matches(column, found, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(
                f"{origin}: there is no column {column!r} ({key}){hint} "
                f"The columns are: {', '.join(map(str, found))}"
            )
        if found.count(column) > 1:
            raise ValueError(f"{origin}: {found.count(column)} columns are called {column!r}")


def _check_utf8(file: Path) -> None:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}: line {number} is not UTF-8 text (byte {line[error.start]:#04x} at place "
                    f"{error.start + 1} of the line); save the file with the encoding UTF-8"
                ) from None


# -- image folders ---------------------------------------------------------------------------------


def _read_image_folder(root: Path, columns: Columns) -> Rows:
    import datasets

    if columns.client:
        raise ValueError(
            f"{root}: an image folder has no column {columns.client!r} (partition.column); for one folder a "
            "client, client/class/image, set partition.kind = 'by_file'"
        )
    depth, images, others = _layout(root)
    table = _load(
        "imagefolder",
        root,
        depth=depth,
        drop_labels=False,
        # No file has such a name: with a metadata file, the library leaves out the labels whatever is asked.
        metadata_filenames=["/"],
    )
    if len(table) != images:
        raise ValueError(f"{root}: {images} images were found, but {len(table)} could be listed")
    stored = table.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    paths = [value["path"] for value in stored[:]["image"]]
    return Rows(
        stored=stored,
        folder=root,
        labels=[
            table.features["label"].int2str(label) for label in table.select_columns(["label"])[:]["label"]
        ],
        places=paths,
        columns=None,
        files=[_file_like(Path(path).parts[-3]) for path in paths] if depth == 2 else None,
        notes=_ignored(root, others, "images"),
    )


def _layout(root: Path) -> tuple[int, int, list[Path]]:
    """1 for ``class/image`` or 2 for ``client/class/image``, the number of images, and the other files."""
    inside = [entry for entry in _visible(root) if entry.is_dir()]
    if not inside:
        raise ValueError(
            f"{root}: there is nothing to read; should have a folder of images for each class, or files "
            f"ending in {', '.join(_KINDS)}"
        )
    if len(inside) > 1 and {folder.name.lower() for folder in inside} <= _SPLITS:
        names = ", ".join(folder.name for folder in inside)
        raise ValueError(
            f"{root}: the folders {names} look like parts of a data set, not like classes or clients; "
            "name one in data.source and another in data.test"
        )
    with_images = [folder for folder in inside if any(map(_is_image, _visible(folder)))]
    with_folders = [folder for folder in inside if any(entry.is_dir() for entry in _visible(folder))]
    if with_images and with_folders:
        raise ValueError(
            f"{root}: {with_images[0].name} holds images and {with_folders[0].name} holds folders; should be "
            "class/image throughout, or client/class/image throughout"
        )
    depth = 2 if with_folders else 1
    classes = inside
    if depth == 2:
        classes = []
        for client in inside:
            of_client = [entry for entry in _visible(client) if entry.is_dir()]
            if not of_client:
                raise ValueError(f"{client}: the client's folder has no class folder with images")
            classes += of_client
    images, others = 0, [entry for entry in _visible(root) if entry.is_file()]
    if depth == 2:
        others += [entry for client in inside for entry in _visible(client) if entry.is_file()]
    if loose := next(filter(_is_image, others), None):
        raise ValueError(f"{loose}: the image is in no class folder")
    for folder in classes:
        files = _visible(folder)
        if deeper := next((entry for entry in files if entry.is_dir()), None):
            raise ValueError(f"{deeper}: a folder inside the class folder {folder.name}")
        if archive := next((entry for entry in files if entry.suffix.lower() == ".zip"), None):
            raise ValueError(f"{archive}: an archive among the images; unpack it, or move it elsewhere")
        found = sum(map(_is_image, files))
        if not found:
            raise ValueError(f"{folder}: the class folder has no images ({len(files)} other files)")
        images += found
        others += [file for file in files if not _is_image(file)]
    return depth, images, others


def _is_image(path: Path) -> bool:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return path.suffix.lower() in ImageFolder.EXTENSIONS and path.is_file()


def _visible(folder: Path) -> list[Path]:
    """What a folder holds, without what the library passes over: names that begin with ``.`` or ``__``."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith((".", "__")))


def _file_like(folder: str) -> str:
    # Partitions by file leave out a name's last suffix, which a folder has not.
    return f"{folder}.folder" if Path(folder).suffix else folder


def _ignored(root: Path, others: Sequence[Path], kind: str) -> list[str]:
    if not others:
        return []
    files = "1 file is" if len(others) == 1 else f"{len(others)} files are"
    return [f"{root}: {files} of unknown kind, not {kind}, and ignored; first: {others[0].relative_to(root)}"]


# -- the library -----------------------------------------------------------------------------------


def _load(kind: str, path: Path, depth: int = 0, **options: Any) -> datasets.Dataset:
    """Read a file, or the files that lie ``depth`` folders deep in a folder, into our own cache."""
    import datasets

    pattern = "/".join([glob.escape(str(path)), *["*"] * (depth + 1 if depth else 0)])
    try:
        with _quietly():
            return datasets.load_dataset(
                kind,
                data_files={"train": [pattern]},
                split="train",
                cache_dir=str(packages.cache_folder() / "datasets"),
                **options,
            )
    except Exception as error:  # pandas', pyarrow's and its own
        raise ValueError(f"{path}: cannot be read as {kind}: {_reason(error)}") from None


@contextmanager
def _quietly() -> Iterator[None]:
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


def _reason(error: BaseException) -> str:
    """The first line of what the innermost error says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
