"""Load the training and test images or recordings of a source, with their classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fedsmoothlora.data import image_splits, read_media, registry
from fedsmoothlora.data.duplicates import HashedRows, duplicate_notes
from fedsmoothlora.data.found import Kept
from fedsmoothlora.data.label_sets import LabelSets
from fedsmoothlora.data.loading import Data, check_form, load_packaged, load_rows, load_test_rows, refuse
from fedsmoothlora.data.raw import LabelledImages, RawImages
from fedsmoothlora.data.read_media import Columns
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.data.stored_audio import StoredAudio
from fedsmoothlora.data.stored_files import StoredFiles
from fedsmoothlora.data.stored_images import StoredImages
from fedsmoothlora.data.texts import UNLABELLED
from fedsmoothlora.errors import ConfigError, DataError

ImageData = Data[LabelledImages]


def load_images(
    settings: DataSettings,
    seed: int,
    client_column: str | None = None,
    *,
    label_sets: LabelSets | None = None,
    elsewhere: bool = False,
) -> ImageData:
    """Load training and test images; ``seed`` draws the rows if not all are used.

    Classes are sorted, whole numbers by their value, unless the data set itself declares an order.

    Args:
        settings: ``[data]``.
        seed: the run's seed.
        client_column: the column of the client that each row belongs to; None if it is not needed.
        label_sets: the columns of labels, if rows have any number of labels in place of one class.
        elsewhere: whether sites hold the training data, so that there are no training rows here.

    Raises:
        ConfigError: the source is unknown, a key does not belong to it, there are fewer rows than asked for,
            or the data are wrong; the message names the file, the row and the column.
        PackageError: the package cannot be fetched.
    """
    settings, notes = image_splits.resolved(settings)
    if elsewhere:
        nothing = np.zeros((0, 1, 1), dtype=np.uint8)
        return load_test_rows(
            settings,
            settings.classes if label_sets is None else UNLABELLED,
            lambda classes: RawImages(nothing, np.zeros(0, dtype=np.int64), classes),
            lambda alone: load_images(alone, seed, label_sets=label_sets),
        )
    refuse(settings, "where_column", "where_values", why="only tables with texts are filtered")
    if settings.source.startswith(registry.PREFIX):
        if client_column is not None:
            raise ConfigError(f"{settings.source} has no column {client_column!r} (partition.column)")
        return _packaged_images(settings, seed, label_sets)
    columns = Columns(
        kind=StoredImages,
        file=settings.image_column,
        label=(settings.label_column or "label") if label_sets is None else None,
        texts={} if label_sets is None else label_sets.texts,
        lists={} if label_sets is None else label_sets.lists,
    )
    data: ImageData = _load_files(settings, seed, columns, client_column)
    data = _verified(_with_range(data, settings.max_value), settings.verify)
    return replace(data, notes=[*notes, *data.notes])


def load_audio(
    settings: DataSettings, seed: int, client_column: str | None = None, *, elsewhere: bool = False
) -> Data[StoredAudio]:
    """Load training and test recordings; ``seed`` draws the rows if not all are used.

    Args, Raises: as in `load_images`.
    """
    settings, notes = image_splits.resolved(settings)
    if elsewhere:
        return load_test_rows(
            settings, settings.classes, StoredAudio.none, lambda alone: load_audio(alone, seed)
        )
    refuse(settings, "where_column", "where_values", why="only tables with texts are filtered")
    refuse(settings, "image_column", "max_value", why="it is for images")
    if settings.source.startswith(registry.PREFIX):
        if client_column is not None:
            raise ConfigError(f"{settings.source} has no column {client_column!r} (partition.column)")
        packaged: Data[Any] = load_packaged(settings, seed)
        check_form(settings, packaged.train, "recordings")
        return packaged
    columns = Columns(kind=StoredAudio, file=settings.audio_column, label=settings.label_column or "label")
    data: Data[StoredAudio] = _load_files(settings, seed, columns, client_column)
    return replace(_verified(data, settings.verify), notes=[*notes, *data.notes])


def _load_files(settings: DataSettings, seed: int, columns: Columns, client_column: str | None) -> Data[Any]:
    """Load images or recordings, in folders or in tables."""
    without = None if settings.test in (None, settings.source) else Path(settings.test).expanduser()
    data: Data[Any] = load_rows(
        settings,
        seed,
        lambda path, split, client: read_media.read_local(
            path, replace(columns, client=client), split, without
        ),
        lambda split, client: read_media.read_hub(
            settings.source, settings.revision, split, replace(columns, client=client), settings.subset
        ),
        client_column,
    )
    _refuse_shared_files(data)
    return data


def _refuse_shared_files(data: Data[Any]) -> None:
    """Raise ``DataError`` if a file is both a training and a test file, through links too."""
    train, test = data.train, data.test
    if test is None:
        return
    if train.column is not None or test.column is not None:
        return  # several rows of a table may name the same file
    status = [Path(place).stat() for place in train.places]
    trained = {(found.st_dev, found.st_ino): row for row, found in enumerate(status)}
    for place in test.places:
        found = Path(place).stat()
        if (row := trained.get((found.st_dev, found.st_ino))) is not None:
            raise DataError(
                f"{place}: the file is both a training and a test {train.item}"
                + (f"; it is the same file as {train.places[row]}" if train.places[row] != place else "")
                + f". data.source and data.test must name different {train.plural}"
            )


def _with_range(data: ImageData, max_value: int | None) -> ImageData:
    """Scale all images of more than 8 bits by the same value of white: the configured one, or the data's."""
    stored = [part for part in (data.train, data.test) if isinstance(part, StoredImages)]
    found = None if max_value else next(filter(None, (part.value_range() for part in stored)), None)
    white = max_value or found
    if white is None:
        return data
    note = f"images of more than 8 bits a pixel are scaled from 0 ... {white} (data.max_value)"
    return replace(
        data,
        train=_scaled(data.train, white),
        test=None if data.test is None else _scaled(data.test, white),
        notes=[*data.notes, note] if found else data.notes,
        max_value=found,
    )


def _scaled(images: LabelledImages, white: int) -> LabelledImages:
    return replace(images, max_value=white) if isinstance(images, StoredImages) else images


def _verified(data: Data[Kept], verify: bool) -> Data[Kept]:
    """Read every image or recording, and add notes on equal ones to the data."""
    if not verify:
        return data
    train, test = (
        HashedRows(digests=part.verify(), labels=part.labels, place=part.where)
        if isinstance(part, StoredFiles)
        else None
        for part in (data.train, data.test)
    )
    if train is None:
        return data
    return replace(data, notes=[*data.notes, *duplicate_notes(train, test, data.classes)])


def _packaged_images(settings: DataSettings, seed: int, label_sets: LabelSets | None) -> ImageData:
    """Packaged images with one class each, or with a list of labels each."""
    if label_sets is not None and label_sets.label_columns is None:
        settings = replace(settings, label_column=None)  # one of the lists, rather than the classes
    data: Data[Any] = load_packaged(settings, seed)
    check_form(settings, data.train, "images")
    known = getattr(data.train, "lists", {})
    lists = ", ".join(known)
    if label_sets is None and lists:
        raise ConfigError(
            f"data.source = {settings.source!r}: its images have any number of labels ({lists}); set "
            "task.kind = 'multi-label-image'"
        )
    if label_sets is not None and not lists:
        raise ConfigError(f"data.source = {settings.source!r}: its images have one class each")
    if label_sets is not None and (label_sets.label_columns or label_sets.column not in known):
        key = (
            "task.label_columns" if label_sets.label_columns else f"data.label_column = {label_sets.column!r}"
        )
        raise ConfigError(
            f"{key}: {settings.source} has the labels in a column of lists; set data.label_column to {lists}"
        )
    return data
