"""Users' own labelled images: folders of images, and tables and hub data sets with a column of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.leftovers import entries_in, folders_in
from fedsmoothlora.data.split_names import is_split_alone, split_of
from fedsmoothlora.data.splits import TRAIN
from fedsmoothlora.data.stored_images import StoredImages, check_regular
from fedsmoothlora.data.tables import (
    KINDS,
    Table,
    ignored,
    read_hub_table,
    read_table,
    reason,
    tables_in,
)
from fedsmoothlora.errors import DataError

if TYPE_CHECKING:  # it takes a second to import
    import datasets

# Tables in an image folder that describe the images: metadata files of the hub, and lists of classes.
_DESCRIPTIONS = {"metadata", "classes"}
# The column of the hub's metadata files that names the image.
_FILE_NAME = "file_name"


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a table that are read.

    Attributes:
        image: column of the image's path or bytes.
        label: column of the image's class.
        client: column of the client that has the image; None if it is not needed.
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
        stored: a data set with one column, ``image``, of the feature ``datasets.Image(decode=False)``.
        folder: the folder to which paths in it are relative.
        labels: text of each row's label.
        places: the file, or the file and row, of each row, for messages.
        columns: the columns that were read; None for an image folder.
        published: the order of classes that the data set itself declares; None if it declares none.
        clients: each row's value of the client column; None if it was not read.
        files: the table, or the client's folder, of each row; None if there is neither.
        notes: notes for the user on the files that were read.
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

    @property
    def label_column(self) -> str | None:
        """The column that the labels were read from; None for an image folder."""
        return self.columns.label if self.columns else None

    def labelled(self, labels: NDArray[np.int64], classes: tuple[str, ...]) -> StoredImages:
        """The images with their classes' numbers."""
        return StoredImages(
            stored=self.stored,
            folder=self.folder,
            labels=labels,
            classes=classes,
            places=tuple(self.places),
            column=self.columns.image if self.columns else None,
        )


def read_local(path: Path, columns: Columns, split: str = TRAIN, without: Path | None = None) -> Rows:
    """Read a table, a folder with one table per client, or an image folder (``class`` or ``client/class``).

    A folder with a ``metadata.csv`` (or ``.jsonl``, ``.parquet``) whose column ``file_name`` names the
    images, as on the hub, is read as a table, unless it has a folder for each class.

    Args:
        path: the file or folder.
        columns: the columns of tables.
        split: the split of a folder of tables that is read.
        without: a folder inside an image folder that is not read.

    Raises:
        DataError: the data are wrong; the message names the file, and for a table the row and the column.
    """
    path = path.absolute()
    files, notes = tables_in(path, split)
    if files and path.is_dir() and {file.name.partition(".")[0] for file in files} <= _DESCRIPTIONS:
        columns, files = _of_descriptions(path, files, columns)
    if not files:
        return _read_image_folder(path, columns, without)
    tables = [read_table(file, columns.keys()) for file in files]
    rows = _of_tables(tables, columns)
    rows.notes.extend([*(note for table in tables for note in table.notes), *notes])
    return rows


def _of_descriptions(root: Path, files: Sequence[Path], columns: Columns) -> tuple[Columns, list[Path]]:
    """The columns and tables to read if all tables in a folder may only describe its images.

    Raises ``DataError`` if the folder is neither a table nor an image folder.
    """
    has_folders = any(entry.is_dir() for entry in entries_in(root))
    named = columns
    if columns.image == Columns.image and not has_folders:
        named = replace(columns, image=_FILE_NAME)
    errors = []
    for tried in (columns, named):
        for file in files:
            try:
                read_table(file, tried.keys())
            except DataError as error:
                errors.append(error)
            else:
                return tried, [file]
    if not has_folders:
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
    published = {part.published for part in parts}
    return Rows(
        stored=datasets.concatenate_datasets([part.stored for part in parts]),
        folder=tables[0].folder,
        labels=[label for part in parts for label in part.labels],
        places=[place for part in parts for place in part.places],
        columns=columns,
        published=published.pop() if len(published) == 1 else None,
        clients=[client for part in parts for client in part.clients or ()] if columns.client else None,
        files=[str(table.file) for table, part in zip(tables, parts, strict=True) for _ in part.labels],
    )


def _from_table(table: Table, columns: Columns) -> Rows:
    from fedsmoothlora.data.datasets_library import datasets

    try:
        stored = table.rows.select_columns([columns.image]).cast_column(
            columns.image, datasets.Image(decode=False)
        )
    except Exception as error:  # the class of pyarrow's error depends on the column's content
        kind = table.rows.features[columns.image]
        raise DataError(
            f"{table.place(0)}, column {columns.image!r}: has {kind}, neither paths nor bytes of images: "
            f"{reason(error)}"
        ) from None
    return Rows(
        stored=stored if columns.image == "image" else stored.rename_column(columns.image, "image"),
        folder=table.folder,
        labels=table.texts(columns.label, "label"),
        places=[table.place(row) for row in range(len(table.rows))],
        columns=columns,
        published=table.classes(columns.label),
        clients=table.texts(columns.client, "client") if columns.client else None,
    )


# -- image folders ---------------------------------------------------------------------------------


def _read_image_folder(root: Path, columns: Columns, without: Path | None) -> Rows:
    from fedsmoothlora.data.datasets_library import datasets

    if columns.client:
        raise DataError(
            f"{root}: an image folder has no column {columns.client!r} (partition.column); for one folder "
            "per client, client/class/image, set partition.kind = 'by_file'"
        )
    layout = _layout(root, without)
    # Sorted as strings, so "a-b/1.png" comes before "a/1.png": partitions depend on the order of rows.
    paths = sorted(map(str, layout.images))
    return Rows(
        stored=datasets.Dataset.from_dict(
            {"image": [{"bytes": None, "path": path} for path in paths]},
            features=datasets.Features({"image": datasets.Image(decode=False)}),
        ),
        folder=root,
        labels=[Path(path).parent.name for path in paths],
        places=paths,
        columns=None,
        files=[_file_like(Path(path).parts[-3]) for path in paths] if layout.has_clients else None,
        notes=ignored(root, layout.others, "images"),
    )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The files of an image folder.

    Attributes:
        has_clients: whether images are in ``client/class``, not in ``class``.
        images: the images.
        others: files that are not images.
    """

    has_clients: bool
    images: list[Path]
    others: list[Path]


def _layout(root: Path, without: Path | None) -> _Layout:
    inside = _folders(root, without)
    if not inside:
        raise DataError(
            f"{root}: there is nothing to read; should have a folder of images for each class, or files "
            f"ending in {', '.join(KINDS)}"
        )
    _refuse_splits(root, inside)
    with_images = [folder for folder in inside if any(map(_is_image, entries_in(folder)))]
    with_folders = [folder for folder in inside if _folders(folder, without)]
    if with_images and with_folders:
        raise DataError(
            f"{root}: {with_images[0].name} has images and {with_folders[0].name} has folders; should be "
            "class/image throughout, or client/class/image throughout"
        )
    outside = [root]
    classes = inside
    if with_folders:
        outside += inside
        classes = []
        for client in inside:
            of_client = _folders(client, without)
            if not of_client:
                raise DataError(f"{client}: the client's folder has no class folder with images")
            _refuse_splits(client, of_client)
            classes += of_client
    others = [entry for folder in outside for entry in entries_in(folder) if not entry.is_dir()]
    if loose := next(filter(_is_image, others), None):
        raise DataError(f"{loose}: the image is in no class folder")
    images = []
    for folder in classes:
        found, rest = _class_folder(folder, without)
        images += found
        others += rest
    return _Layout(has_clients=bool(with_folders), images=images, others=others)


def _class_folder(folder: Path, without: Path | None) -> tuple[list[Path], list[Path]]:
    """The images of a class, and its other files."""
    files = entries_in(folder)
    if deeper := next(iter(_folders(folder, without)), None):
        raise DataError(f"{deeper}: a folder inside the class folder {folder.name}")
    if archive := next((entry for entry in files if entry.suffix.lower() == ".zip"), None):
        raise DataError(f"{archive}: an archive among the images; unpack it, or move it elsewhere")
    images = [file for file in files if _is_image(file)]
    known = set(images)
    others = [file for file in files if file not in known and not file.is_dir()]
    if not images:
        raise DataError(f"{folder}: the class folder has no images ({len(others)} other files)")
    return images, others


def _refuse_splits(parent: Path, folders: Sequence[Path]) -> None:
    """Raise ``DataError`` if folders that would be read as classes or clients are splits.

    A single folder ``train`` beside other folders is accepted as a class: it may have pictures of trains.
    """
    splits = [folder.name for folder in folders if is_split_alone(folder.name)]
    if splits and splits != ["train"]:
        raise DataError(
            f"{parent}: {', '.join(splits)} look like splits of the data set, the other folders like classes "
            "or clients. Name the training images in data.source and the test images in data.test, or, if it "
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


def _is_image(path: Path) -> bool:
    """Whether a file is an image, by its suffix. Raises ``DataError`` for devices and broken links."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    if path.suffix.lower() not in ImageFolder.EXTENSIONS or path.is_dir():
        return False
    try:
        check_regular(path)
    except DataError as error:
        raise DataError(f"{path}: cannot be read as an image: {error}") from None
    return True


def _file_like(folder: str) -> str:
    # `by_file` removes the last suffix of a name, but a dot in a folder's name does not begin a suffix.
    return f"{folder}.folder" if Path(folder).suffix else folder
