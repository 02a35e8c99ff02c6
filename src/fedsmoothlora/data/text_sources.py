"""Load the training and test texts of a source, with their classes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from fedsmoothlora.data import read_texts, registry
from fedsmoothlora.data.duplicates import duplicate_notes, hashed_texts
from fedsmoothlora.data.loading import (
    PACKAGED,
    Data,
    check_form,
    is_path,
    load_packaged,
    load_rows,
    load_test_rows,
    refuse,
)
from fedsmoothlora.data.read_texts import TextColumns
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.data.table_files import column_names
from fedsmoothlora.data.tables import hub_columns, tables_in
from fedsmoothlora.data.texts import UNLABELLED, Texts
from fedsmoothlora.errors import ConfigError


def load_texts(
    settings: DataSettings,
    seed: int,
    texts: Mapping[str, str],
    label_column: str | None,
    client_column: str | None = None,
    *,
    lists: Mapping[str, str] = MappingProxyType({}),
    json: Collection[str] = (),
    targets: Collection[str] = (),
    elsewhere: bool = False,
) -> Data[Texts]:
    """Load training and test texts; ``seed`` draws the rows if not all are used.

    Args:
        settings: ``[data]``.
        seed: the run's seed.
        texts: columns of text, each with the configuration key that names it.
        label_column: the column of the label; None if rows need none.
        client_column: the column of the client that each row belongs to; None if it is not needed.
        lists: columns of lists of texts, each with the configuration key that names it.
        json: those of the columns that hold lists and objects, read as JSON text.
        targets: those of the columns that the model predicts; rows are equal if all others are.
        elsewhere: whether sites hold the training data, so that there are no training rows here.

    Raises:
        ConfigError: as in `load_images`.
        PackageError: the package cannot be fetched.
    """
    if elsewhere:
        return load_test_rows(
            settings,
            UNLABELLED if label_column is None else settings.classes,
            lambda classes: Texts(
                {name: [] for name in texts},
                np.zeros(0, dtype=np.int64),
                classes,
                lists={name: [] for name in lists},
            ),
            lambda alone: load_texts(alone, seed, texts, label_column, lists=lists, json=json),
        )
    refuse(
        settings, "image_column", "audio_column", "verify", "max_value", why="it is for images and recordings"
    )
    if (settings.where_column is None) != (not settings.where_values):
        raise ConfigError("data.where_column and data.where_values: give both, or neither")
    if settings.source.startswith(registry.PREFIX):
        refuse(settings, "where_column", "where_values", why="only tables of one's own are filtered")
        if settings.label_column in {**texts, **lists}:  # one of the columns, rather than the classes
            settings = replace(settings, label_column=None)
        data: Data[Texts] = load_packaged(settings, seed)
        _check_columns(settings, data.train, texts, lists)
        return replace(data, client_of_row=_client_of_row(settings, data.train, client_column))
    columns = TextColumns(
        texts=texts,
        json=json,
        label=label_column,
        where=settings.where_column,
        values=settings.where_values,
        lists=lists,
    )
    data = load_rows(
        settings,
        seed,
        lambda path, split, client: read_texts.read_local(path, replace(columns, client=client), split),
        lambda split, client: read_texts.read_hub(
            settings.source, settings.revision, split, replace(columns, client=client), settings.subset
        ),
        client_column,
    )
    named = [name for name in (*texts, *lists) if name not in targets]
    if not named:  # a template without columns
        return data
    test = None if data.test is None else hashed_texts(data.test, named)
    notes = duplicate_notes(hashed_texts(data.train, named), test, data.classes)
    return replace(data, notes=[*data.notes, *notes])


def text_columns(settings: DataSettings) -> tuple[str, ...]:
    """The names of the columns of the training texts; empty for files that are not there or no tables.

    A column that only some files have is among them, so that it is not ignored; reading then names a file
    without it.

    Raises ``DataError`` if the file or the data set cannot be read.
    """
    if settings.source.startswith(registry.PREFIX):
        packaged = registry.find_packaged(settings.source, PACKAGED).load
        train, _ = packaged() if settings.path is None else packaged(settings.path)
        return tuple(train.columns) if isinstance(train, Texts) else ()
    path = Path(settings.source).expanduser()
    if not is_path(settings.source):
        return hub_columns(settings.source, settings.revision, settings.train_split, settings.subset)
    files = tables_in(path, settings.train_split)[0] if path.exists() else []
    return tuple(dict.fromkeys(name for file in files for name in column_names(file)))


def _check_columns(
    settings: DataSettings, train: Texts, texts: Mapping[str, str], lists: Mapping[str, str]
) -> None:
    check_form(settings, train, "texts")
    for wanted, known, what in ((texts, train.columns, "column"), (lists, train.lists, "column of lists")):
        for column, key in wanted.items():
            if column not in known:
                raise ConfigError(
                    f"{settings.source} has no {what} {column!r} ({key}). The columns are: "
                    + ", ".join((*train.columns, *train.lists))
                )


def _client_of_row(settings: DataSettings, train: Texts, column: str | None) -> list[str] | None:
    if column is None:
        return None
    if column not in train.columns:
        raise ConfigError(
            f"{settings.source} has no column {column!r} (partition.column). The columns are: "
            + ", ".join(train.columns)
        )
    return list(train.columns[column])
