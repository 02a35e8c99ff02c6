"""Load the training and test sets of a source, with their classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.algebra.seeds import seed_for
from fedsmoothlora.data import image_splits, read_media, read_texts, registry, splits
from fedsmoothlora.data.duplicates import HashedRows, duplicate_notes, hashed_texts, similar_class_notes
from fedsmoothlora.data.label_sets import LabelSets
from fedsmoothlora.data.raw import LabelledImages, LabelledRows, RawImages
from fedsmoothlora.data.read_media import Columns
from fedsmoothlora.data.read_texts import TextColumns
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.data.splits import Splits
from fedsmoothlora.data.stored_audio import StoredAudio
from fedsmoothlora.data.stored_files import StoredFiles
from fedsmoothlora.data.stored_images import StoredImages
from fedsmoothlora.data.table_files import column_names, has_table_suffix
from fedsmoothlora.data.tables import hub_columns, splits_in, tables_in
from fedsmoothlora.data.texts import UNLABELLED, Texts, sorted_names
from fedsmoothlora.errors import ConfigError, DataError

PACKAGED = "fedsmoothlora.data.packaged"

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")

Kept = TypeVar("Kept", bound=LabelledRows)
KeptByReader = TypeVar("KeptByReader", bound=LabelledRows, covariant=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Data(Generic[Kept]):
    """Labelled rows to train on and to test on.

    Attributes:
        train: the training set.
        test: the test set, of the same classes; None if there is none.
        client_of_row: each training row's value of the client column; None if it was not read.
        file_of_row: the file, or the client's folder, of each training row; None if the training set does not
            have one file or folder per client.
        notes: notes for the user on the files and rows.
        label_names: names of the model's outputs for tasks whose rows do not have one class each, such as the
            tags of tokens; None if they are the classes.
        max_value: the value of white that was found for images of more than 8 bits; None if there are none,
            or if the configuration sets it.
        form: the form of the rows as chats or instructions, if they have one (`data.chats.Form`).
    """

    train: Kept
    test: Kept | None
    client_of_row: list[str] | None = None
    file_of_row: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    label_names: tuple[str, ...] | None = None
    max_value: int | None = None
    form: str | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, in the labels' order."""
        return self.train.classes

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the model's outputs, in their order; the classes unless the task says otherwise."""
        return self.classes if self.label_names is None else self.label_names


ImageData = Data[LabelledImages]


class Found(Protocol[KeptByReader]):
    """The rows that a reader returns, before the classes are known."""

    @property
    def labels(self) -> list[str] | None: ...
    @property
    def places(self) -> list[str]: ...
    @property
    def label_column(self) -> str | None: ...
    @property
    def published(self) -> tuple[str, ...] | None: ...
    @property
    def clients(self) -> list[str] | None: ...
    @property
    def files(self) -> list[str] | None: ...
    @property
    def notes(self) -> list[str]: ...

    def labelled(self, labels: NDArray[np.int64], classes: tuple[str, ...]) -> KeptByReader:
        """The rows with their classes' numbers."""
        ...


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
        return _elsewhere(
            settings,
            settings.classes if label_sets is None else UNLABELLED,
            lambda classes: RawImages(nothing, np.zeros(0, dtype=np.int64), classes),
            lambda alone: load_images(alone, seed, label_sets=label_sets),
        )
    _refuse(settings, "where_column", "where_values", why="only tables with texts are filtered")
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
        return _elsewhere(settings, settings.classes, StoredAudio.none, lambda alone: load_audio(alone, seed))
    _refuse(settings, "where_column", "where_values", why="only tables with texts are filtered")
    _refuse(settings, "image_column", "max_value", why="it is for images")
    if settings.source.startswith(registry.PREFIX):
        if client_column is not None:
            raise ConfigError(f"{settings.source} has no column {client_column!r} (partition.column)")
        packaged: Data[Any] = _load_packaged(settings, seed)
        _check_form(settings, packaged.train, "recordings")
        return packaged
    columns = Columns(kind=StoredAudio, file=settings.audio_column, label=settings.label_column or "label")
    data: Data[StoredAudio] = _load_files(settings, seed, columns, client_column)
    return replace(_verified(data, settings.verify), notes=[*notes, *data.notes])


def _load_files(settings: DataSettings, seed: int, columns: Columns, client_column: str | None) -> Data[Any]:
    """Load images or recordings, in folders or in tables."""
    without = None if settings.test in (None, settings.source) else Path(settings.test).expanduser()
    data: Data[Any] = _load(
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
        return _elsewhere(
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
    _refuse(
        settings, "image_column", "audio_column", "verify", "max_value", why="it is for images and recordings"
    )
    if (settings.where_column is None) != (not settings.where_values):
        raise ConfigError("data.where_column and data.where_values: give both, or neither")
    if settings.source.startswith(registry.PREFIX):
        _refuse(settings, "where_column", "where_values", why="only tables of one's own are filtered")
        if settings.label_column in {**texts, **lists}:  # one of the columns, rather than the classes
            settings = replace(settings, label_column=None)
        data: Data[Texts] = _load_packaged(settings, seed)
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
    data = _load(
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

    Raises ``DataError`` if the file or the data set cannot be read.
    """
    if settings.source.startswith(registry.PREFIX):
        load = registry.find_packaged(settings.source, PACKAGED).load
        train, _ = load() if settings.path is None else load(settings.path)
        return tuple(train.columns) if isinstance(train, Texts) else ()
    path = Path(settings.source).expanduser()
    if not is_path(settings.source):
        return hub_columns(settings.source, settings.revision, settings.train_split, settings.subset)
    files = tables_in(path, settings.train_split)[0] if path.exists() else []
    return column_names(files[0]) if files else ()


def _load(
    settings: DataSettings,
    seed: int,
    read_local: Callable[[Path, str, str | None], Found[Kept]],
    read_hub: Callable[[str, str | None], Found[Kept]],
    client_column: str | None,
) -> Data[Kept]:
    """Load data from a local path or the hub; the readers' last argument is the client column, or None."""
    path = Path(settings.source).expanduser()
    found_test: Found[Kept] | None = None
    notes: list[str] = []
    is_local = is_path(settings.source)
    if is_local:
        _refuse(settings, "path", "revision", "subset", why="a local path has none")
        if not path.exists():
            raise ConfigError(f"data.source = {settings.source!r}: there is no such file or folder")
        by_split = splits_in(path)
        if not by_split:
            _refuse(settings, "train_split", "test_split", why="its files name no splits")
    else:
        _refuse(settings, "path", why="a hub data set has none")
    if settings.test is not None and settings.test_split is not None:
        raise ConfigError(
            f"data.test = {settings.test!r} and data.test_split = {settings.test_split!r}: give one of them"
        )
    if is_local:
        found = read_local(path, settings.train_split, client_column)
        test_split = settings.test_split
        if test_split is None and splits.TEST in by_split and settings.train_split != splits.TEST:
            test_split = splits.TEST
        if settings.test is None and test_split is not None:
            found_test = read_local(path, test_split, None)
        if by_split:
            notes.append(_split_note(path, by_split, settings, test_split))
    else:
        found = read_hub(settings.train_split, client_column)
        found_test = read_hub(settings.test_split, None) if settings.test_split is not None else None
    if settings.test is not None:
        folder = Path(settings.test).expanduser()
        if not folder.exists():
            raise ConfigError(f"data.test = {settings.test!r}: there is no such file or folder")
        test_split = _split_to_test_on(splits_in(folder))
        if is_local:
            splits.refuse_shared_files(
                tables_in(path, settings.train_split)[0], tables_in(folder, test_split)[0]
            )
        found_test = read_local(folder, test_split, None)
    classes = _named(found, settings.classes) or _classes(found)
    rows = _drawn("train_rows", len(found.places), settings.train_rows, seed)
    train = _labelled(found, classes).take(rows)
    test = None
    if found_test is not None:
        test = _labelled(found_test, classes)
        test = test.take(_drawn("test_rows", len(test), settings.test_rows, seed))
    elif settings.test_rows is not None:
        raise ConfigError(f"data.test_rows = {settings.test_rows}: there is no test set")
    return Data(
        train=train,
        test=test,
        client_of_row=_of_rows(found.clients, rows),
        file_of_row=_of_rows(found.files, rows),
        notes=[
            *notes,
            *found.notes,
            *(found_test.notes if found_test else ()),
            *similar_class_notes(classes),
        ],
    )


def is_path(source: str) -> bool:
    """Whether a source is a local path, existing or not, rather than an id of the Hugging Face hub."""
    path = Path(source).expanduser()
    return (
        has_table_suffix(source)
        or source.startswith((".", "~"))
        or _HUB_ID.fullmatch(source) is None
        or path.exists()
        # The folder is there, so a missing file in it is mistyped. An id of the hub names no folder.
        or (len(path.parts) > 1 and path.parent.is_dir())
    )


def _split_to_test_on(by_split: Splits) -> str:
    """The split of a test folder to test on: the only one, or ``test``."""
    return splits.TEST if len(by_split) != 1 else next(iter(by_split))


def _split_note(path: Path, by_split: Splits, settings: DataSettings, test_split: str | None) -> str:
    """A note on how the splits of a folder are used."""

    def use(split: str) -> str:
        if split == settings.train_split:
            return "the training set" if split != splits.TEST else "read"
        if split == test_split and settings.test is None:
            return "the test set"
        return "not read" if settings.test is None else "no part of the training set"

    uses = [
        f"{split} ({len(files)} {'file' if len(files) == 1 else 'files'}) is {use(split)}"
        for split, files in by_split.items()
    ]
    return f"{path}: the files' names are names of splits: {', '.join(uses)}"


def _elsewhere(
    settings: DataSettings,
    classes: tuple[str, ...],
    empty: Callable[[tuple[str, ...]], Kept],
    load: Callable[[DataSettings], Data[Kept]],
) -> Data[Kept]:
    """Load only the test rows, for a coordinator whose sites hold the training data.

    Raises ``ConfigError`` if ``classes`` is empty, and as ``load`` does.
    """
    if not classes:
        raise ConfigError(
            "data.classes is missing: if sites hold the data, it must name the classes in the labels' order"
        )
    if settings.test is None:
        return Data(train=empty(classes), test=None)
    by_split = splits_in(Path(settings.test).expanduser())
    alone = replace(
        settings,
        source=settings.test,
        test=None,
        train_rows=settings.test_rows,
        test_rows=None,
        train_split=_split_to_test_on(by_split) if by_split else splits.TRAIN,
        test_split=None,
    )
    data = load(alone)
    return replace(data, train=empty(data.classes), test=data.train)


def _load_packaged(settings: DataSettings, seed: int) -> Data[Kept]:
    columns, splits = ("image_column", "label_column"), ("train_split", "test_split", "test")
    keys = ("revision", "subset", *columns, *splits, "classes", "max_value")
    _refuse(settings, *keys, why=f"{settings.source} has none")
    load = registry.find_packaged(settings.source, PACKAGED).load
    train, test = load() if settings.path is None else load(settings.path)
    return Data(
        train=train.take(_drawn("train_rows", len(train), settings.train_rows, seed)),
        test=test.take(_drawn("test_rows", len(test), settings.test_rows, seed)),
    )


def _packaged_images(settings: DataSettings, seed: int, label_sets: LabelSets | None) -> ImageData:
    """Packaged images with one class each, or with a list of labels each."""
    if label_sets is not None and label_sets.label_columns is None:
        settings = replace(settings, label_column=None)  # one of the lists, rather than the classes
    data: Data[Any] = _load_packaged(settings, seed)
    _check_form(settings, data.train, "images")
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


# Forms of packaged rows, each with the task that it is for.
_FORMS: Mapping[str, str] = {
    "texts": "text-classification' or 'causal-lm",
    "images": "image-classification",
    "recordings": "audio-classification",
}


def _check_form(settings: DataSettings, train: object, wanted: str) -> None:
    """Raise ``ConfigError`` for packaged rows of another form."""
    found = (
        "texts" if isinstance(train, Texts) else "recordings" if isinstance(train, StoredAudio) else "images"
    )
    if found != wanted:
        raise ConfigError(
            f"data.source = {settings.source!r} holds {found}, not {wanted}: set "
            f"task.kind = '{_FORMS[found]}'"
        )


def _check_columns(
    settings: DataSettings, train: Texts, texts: Mapping[str, str], lists: Mapping[str, str]
) -> None:
    _check_form(settings, train, "texts")
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


def _refuse(settings: DataSettings, *keys: str, why: str) -> None:
    """Refuse keys that are set but have no meaning for the source."""
    defaults = {part.name: part.default for part in fields(settings) if part.default is not MISSING}
    for key in keys:
        if (value := getattr(settings, key)) != defaults[key]:
            raise ConfigError(
                f"data.{key} = {value!r} does not belong to data.source = {settings.source!r}: {why}"
            )


def _classes(found: Found[Kept]) -> tuple[str, ...]:
    if found.labels is None:
        return UNLABELLED
    if found.published is not None:
        return found.published
    names = set(found.labels)
    if all(map(_NUMBER.fullmatch, names)) and not all(float(name).is_integer() for name in names):
        first = next(row for row, name in enumerate(found.labels) if not float(name).is_integer())
        raise DataError(
            f"{found.places[first]}{_column(found)}: the label is the decimal number {found.labels[first]}; "
            f"classes are texts or whole numbers. If these {len(names)} values are classes, name them in "
            "data.classes; to predict numbers, set task.kind = 'text-regression'; otherwise write a "
            "class into each row, such as a range of values"
        )
    if len(names) == 1:
        raise DataError(
            f"{found.places[0]}{_column(found)}: there is only one class, {found.labels[0]!r}; should be more"
        )
    return sorted_names(names)


def _named(found: Found[Kept], classes: tuple[str, ...]) -> tuple[str, ...]:
    """Check that every row's class is in ``data.classes``, and return these; empty for unlabelled rows."""
    for place, name in zip(found.places, found.labels or (), strict=bool(found.labels)):
        if classes and name not in classes:
            raise DataError(
                f"{place}{_column(found)}: the class {name!r} is not in data.classes = {', '.join(classes)}"
            )
    return classes if found.labels is not None else ()


def _labelled(found: Found[Kept], classes: tuple[str, ...]) -> Kept:
    if found.labels is None:
        return found.labelled(np.zeros(len(found.places), dtype=np.int64), classes)
    number = {name: label for label, name in enumerate(classes)}
    for place, name in zip(found.places, found.labels, strict=True):
        if name not in number:
            raise DataError(
                f"{place}{_column(found)}: the class {name!r} is not in the training set, whose classes are "
                + ", ".join(classes)
            )
    return found.labelled(np.array([number[name] for name in found.labels], dtype=np.int64), classes)


def _column(found: Found[Kept]) -> str:
    return f", column {found.label_column!r}" if found.label_column is not None else ""


def _drawn(key: str, available: int, wanted: int | None, seed: int) -> NDArray[np.int64]:
    """The indices of the rows to use, sorted."""
    if wanted is None:
        return np.arange(available, dtype=np.int64)
    if wanted > available:
        raise ConfigError(f"data.{key} = {wanted}: there are {available}")
    chosen = np.random.default_rng(seed_for(seed, key)).permutation(available)[:wanted]
    return np.sort(chosen).astype(np.int64)


def _of_rows(values: Sequence[str] | None, rows: NDArray[np.int64]) -> list[str] | None:
    return None if values is None else [values[row] for row in rows]
