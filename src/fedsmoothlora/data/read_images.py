"""Users' own labelled images: folders, and tables and hub data sets with a column of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.splits import TRAIN
from fedsmoothlora.data.stored_images import StoredImages
from fedsmoothlora.data.tables import (
    KINDS,
    Table,
    ignored,
    load_with,
    read_hub_table,
    read_table,
    reason,
    tables_in,
    visible,
)
from fedsmoothlora.errors import DataError

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


def read_local(path: Path, columns: Columns, split: str = TRAIN) -> Rows:
    """Read a table, a folder of tables (one a client), or an image folder (``class`` or ``client/class``).

    Raises:
        DataError: the data cannot be right; the message names the file, and the row and column if it has.
    """
    path = path.absolute()
    files, notes = tables_in(path, split)
    if not files:
        return _read_image_folder(path, columns)
    tables = [read_table(file, columns.keys()) for file in files]
    rows = _of_tables(tables, columns)
    rows.notes.extend([*(note for table in tables for note in table.notes), *notes])
    return rows


def read_hub(source: str, revision: str | None, split: str, columns: Columns) -> Rows:
    """Read a data set of the Hugging Face hub, or what the library's own cache has of it.

    Raises:
        DataError: it cannot be had, or its data cannot be right.
    """
    return _from_table(read_hub_table(source, revision, split, columns.keys()), columns)


def _of_tables(tables: Sequence[Table], columns: Columns) -> Rows:
    import datasets

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
    import datasets

    try:
        stored = table.rows.select_columns([columns.image]).cast_column(
            columns.image, datasets.Image(decode=False)
        )
    except Exception as error:  # pyarrow's, by what the column holds
        kind = table.rows.features[columns.image]
        raise DataError(
            f"{table.place(0)}, column {columns.image!r}: holds {kind}, neither paths nor bytes of images: "
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


def _read_image_folder(root: Path, columns: Columns) -> Rows:
    import datasets

    if columns.client:
        raise DataError(
            f"{root}: an image folder has no column {columns.client!r} (partition.column); for one folder a "
            "client, client/class/image, set partition.kind = 'by_file'"
        )
    depth, images, others = _layout(root)
    table = load_with(
        "imagefolder",
        root,
        depth=depth,
        drop_labels=False,
        # No file has such a name: with a metadata file, the library leaves out the labels whatever is asked.
        metadata_filenames=["/"],
    )
    if len(table) != images:
        raise DataError(f"{root}: {images} images were found, but {len(table)} could be listed")
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
        notes=ignored(root, others, "images"),
    )


def _layout(root: Path) -> tuple[int, int, list[Path]]:
    """1 for ``class/image`` or 2 for ``client/class/image``, the number of images, and the other files."""
    inside = [entry for entry in visible(root) if entry.is_dir()]
    if not inside:
        raise DataError(
            f"{root}: there is nothing to read; should have a folder of images for each class, or files "
            f"ending in {', '.join(KINDS)}"
        )
    if len(inside) > 1 and {folder.name.lower() for folder in inside} <= _SPLITS:
        names = ", ".join(folder.name for folder in inside)
        raise DataError(
            f"{root}: the folders {names} look like parts of a data set, not like classes or clients; "
            "name one in data.source and another in data.test"
        )
    with_images = [folder for folder in inside if any(map(_is_image, visible(folder)))]
    with_folders = [folder for folder in inside if any(entry.is_dir() for entry in visible(folder))]
    if with_images and with_folders:
        raise DataError(
            f"{root}: {with_images[0].name} holds images and {with_folders[0].name} holds folders; should be "
            "class/image throughout, or client/class/image throughout"
        )
    depth = 2 if with_folders else 1
    classes = inside
    if depth == 2:
        classes = []
        for client in inside:
            of_client = [entry for entry in visible(client) if entry.is_dir()]
            if not of_client:
                raise DataError(f"{client}: the client's folder has no class folder with images")
            classes += of_client
    images, others = 0, [entry for entry in visible(root) if entry.is_file()]
    if depth == 2:
        others += [entry for client in inside for entry in visible(client) if entry.is_file()]
    if loose := next(filter(_is_image, others), None):
        raise DataError(f"{loose}: the image is in no class folder")
    for folder in classes:
        files = visible(folder)
        if deeper := next((entry for entry in files if entry.is_dir()), None):
            raise DataError(f"{deeper}: a folder inside the class folder {folder.name}")
        if archive := next((entry for entry in files if entry.suffix.lower() == ".zip"), None):
            raise DataError(f"{archive}: an archive among the images; unpack it, or move it elsewhere")
        found = sum(map(_is_image, files))
        if not found:
            raise DataError(f"{folder}: the class folder has no images ({len(files)} other files)")
        images += found
        others += [file for file in files if not _is_image(file)]
    return depth, images, others


def _is_image(path: Path) -> bool:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return path.suffix.lower() in ImageFolder.EXTENSIONS and path.is_file()


def _file_like(folder: str) -> str:
    # Partitions by file leave out a name's last suffix, which a folder has not.
    return f"{folder}.folder" if Path(folder).suffix else folder
