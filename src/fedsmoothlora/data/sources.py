"""Data by its source: the training and test sets, and their classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from numpy.typing import NDArray

from fedsmoothlora import sources
from fedsmoothlora.data.raw import LabelledImages, RawImages
from fedsmoothlora.data.reading import Columns, Rows, read_hub, read_local
from fedsmoothlora.data.stored_images import StoredImages
from fedsmoothlora.seeds import seed_for

PACKAGED = "fedsmoothlora.data.packaged"

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The keys of ``[data]``.

    Attributes:
        source: ``pkg:NAME`` (`fedsmoothlora list datasets`); the path of an image folder, of a CSV, JSONL or
            Parquet file, or of a folder with one image folder or one such file a client; or a data set's id
            on the Hugging Face hub.
        path: the folder of a ``pkg:`` set's files, where they are not where it looks for them.
        revision: commit, tag or branch of a hub data set; its newest unless set.
        image_column: the column with the image: its path, relative to the file, or its bytes.
        label_column: the column with the image's class.
        train_split: the part of a hub data set to train on.
        test_split: the part of a hub data set to test on.
        test: the path of the test set, of any kind that ``source`` may have but the hub's.
        validation: share of each client's rows that is kept for validation, from 0 to 0.5.
        verify: open every image once before training, so that a broken one is found then.
        classes: the classes' names, in the labels' order; those of the training set unless set. Sites with
            data of their own need one order for all, also where a class is missing at one of them.
        train_rows: take that many training rows only, drawn by the run's seed; all unless set.
        test_rows: the same of the test set.
    """

    source: str
    path: str | None = None
    revision: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = "train"
    test_split: str | None = None
    test: str | None = None
    validation: Annotated[float, Ge(0), Le(0.5)] = 0.0
    verify: bool = True
    classes: tuple[str, ...] = ()
    train_rows: Annotated[int, Ge(1)] | None = None
    test_rows: Annotated[int, Ge(1)] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageData:
    """Labelled images to train on and to test on.

    Attributes:
        train: the training set.
        test: the test set, of the same classes; None if there is none.
        client_of_row: each training row's value of the client column; None if it was not asked for.
        file_of_row: the file, or the client's folder, that each training row is from; None if the training
            set does not come in files of rows.
        notes: what people should know of what was read.
    """

    train: LabelledImages
    test: LabelledImages | None
    client_of_row: list[str] | None = None
    file_of_row: list[str] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, in the labels' order."""
        return self.train.classes


def load_images(settings: DataSettings, seed: int, client_column: str | None = None) -> ImageData:
    """Training and test images; ``seed`` draws the rows where fewer than all are wanted.

    Classes are sorted, whole numbers by their value; a data set that publishes an order of its own keeps it.

    Args:
        settings: ``[data]``.
        seed: the run's.
        client_column: a column that tells whose each row is; its values are wanted too.

    Raises:
        ValueError: an unknown source, a key that does not belong to it, more rows wanted than there are, or
            data that cannot be right; the message names the file, the row and the column.
        PackageError: the package cannot be had.
    """
    if settings.source.startswith(sources.PREFIX):
        return _load_packaged(settings, seed, client_column)
    columns = Columns(image=settings.image_column, label=settings.label_column, client=client_column)
    path = Path(settings.source).expanduser()
    if path.exists():
        _refuse(settings, "path", "revision", "train_split", "test_split", why="a local path has none")
        found, found_test = read_local(path, columns), None
    elif _HUB_ID.fullmatch(settings.source):
        _refuse(settings, "path", why="a hub data set has none")
        found, found_test = _read_hub(settings, columns)
    else:
        raise ValueError(f"data.source = {settings.source!r}: there is no such file or folder")
    if settings.test is not None:
        folder = Path(settings.test).expanduser()
        if not folder.exists():
            raise ValueError(f"data.test = {settings.test!r}: there is no such file or folder")
        found_test = read_local(folder, Columns(image=settings.image_column, label=settings.label_column))
    classes = _named(found, settings.classes) or _classes(found)
    rows = _drawn("train_rows", len(found.labels), settings.train_rows, seed)
    train = _labelled(found, classes).take(rows)
    test = None
    if found_test is not None:
        test = _labelled(found_test, classes)
        test = test.take(_drawn("test_rows", len(test), settings.test_rows, seed))
    elif settings.test_rows is not None:
        raise ValueError(f"data.test_rows = {settings.test_rows}: there is no test set")
    if settings.verify:
        train.verify()
        if test is not None:
            test.verify()
    return ImageData(
        train=train,
        test=test,
        client_of_row=_of_rows(found.clients, rows),
        file_of_row=_of_rows(found.files, rows),
        notes=found.notes + (found_test.notes if found_test else []),
    )


def load_test_images(settings: DataSettings, seed: int) -> ImageData:
    """The test images alone, for a coordinator whose sites hold the training data.

    Raises ``ValueError`` where ``classes`` is not set, and as `load_images`.
    """
    if not settings.classes:
        raise ValueError(
            "data.classes is missing: where sites hold the data, it names the classes in the labels' order"
        )
    none = np.zeros(0, dtype=np.int64)
    empty: LabelledImages = RawImages(np.zeros((0, 1, 1), dtype=np.uint8), none, settings.classes)
    if settings.test is None:
        return ImageData(train=empty, test=None)
    alone = replace(settings, source=settings.test, test=None, train_rows=settings.test_rows, test_rows=None)
    data = load_images(alone, seed)
    return ImageData(train=empty, test=data.train, notes=data.notes)


def _load_packaged(settings: DataSettings, seed: int, client_column: str | None) -> ImageData:
    keys = ("revision", "image_column", "label_column", "train_split", "test_split", "test", "classes")
    _refuse(settings, *keys, why=f"{settings.source} has none")
    if client_column is not None:
        raise ValueError(f"{settings.source} has no column {client_column!r} (partition.column)")
    load = sources.find_packaged(settings.source, PACKAGED).load
    train, test = load() if settings.path is None else load(settings.path)
    return ImageData(
        train=train.take(_drawn("train_rows", len(train), settings.train_rows, seed)),
        test=test.take(_drawn("test_rows", len(test), settings.test_rows, seed)),
    )


def _read_hub(settings: DataSettings, columns: Columns) -> tuple[Rows, Rows | None]:
    if settings.test is not None and settings.test_split is not None:
        raise ValueError(
            f"data.test = {settings.test!r} and data.test_split = {settings.test_split!r}: give one of them"
        )
    train = read_hub(settings.source, settings.revision, settings.train_split, columns)
    if settings.test_split is None:
        return train, None
    plain = Columns(image=columns.image, label=columns.label)
    return train, read_hub(settings.source, settings.revision, settings.test_split, plain)


def _refuse(settings: DataSettings, *keys: str, why: str) -> None:
    """Refuse keys that have no meaning for the source and yet are set."""
    defaults = {part.name: part.default for part in fields(settings) if part.default is not MISSING}
    for key in keys:
        if (value := getattr(settings, key)) != defaults[key]:
            raise ValueError(
                f"data.{key} = {value!r} does not belong to data.source = {settings.source!r}: {why}"
            )


def _classes(rows: Rows) -> tuple[str, ...]:
    if rows.published is not None:
        return rows.published
    names = set(rows.labels)
    if len(names) == 1:
        where = f", column {rows.columns.label!r}" if rows.columns else ""
        raise ValueError(
            f"{rows.places[0]}{where}: there is only one class, {rows.labels[0]!r}; should be more"
        )
    if all(re.fullmatch(r"[+-]?[0-9]+", name) for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _named(rows: Rows, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes that the configuration names; every row has one of them."""
    for place, name in zip(rows.places, rows.labels, strict=True):
        if classes and name not in classes:
            raise ValueError(f"{place}: the class {name!r} is not in data.classes = {', '.join(classes)}")
    return classes


def _labelled(rows: Rows, classes: tuple[str, ...]) -> StoredImages:
    number = {name: label for label, name in enumerate(classes)}
    for place, name in zip(rows.places, rows.labels, strict=True):
        if name not in number:
            where = f", column {rows.columns.label!r}" if rows.columns else ""
            raise ValueError(
                f"{place}{where}: the class {name!r} is not in the training set, whose classes are "
                + ", ".join(classes)
            )
    return StoredImages(
        stored=rows.stored,
        folder=rows.folder,
        labels=np.array([number[name] for name in rows.labels], dtype=np.int64),
        classes=classes,
        places=tuple(rows.places),
        column=rows.columns.image if rows.columns else None,
    )


def _drawn(key: str, available: int, wanted: int | None, seed: int) -> NDArray[np.int64]:
    """The rows to take, sorted."""
    if wanted is None:
        return np.arange(available, dtype=np.int64)
    if wanted > available:
        raise ValueError(f"data.{key} = {wanted}: there are {available}")
    chosen = np.random.default_rng(seed_for(seed, key)).permutation(available)[:wanted]
    return np.sort(chosen).astype(np.int64)


def _of_rows(values: Sequence[str] | None, rows: NDArray[np.int64]) -> list[str] | None:
    return None if values is None else [values[row] for row in rows]
