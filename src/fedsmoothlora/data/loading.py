"""Load the training and test rows of a source: a local path, the hub, or a package."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.algebra.seeds import seed_for
from fedsmoothlora.data import registry, splits
from fedsmoothlora.data.duplicates import similar_class_notes
from fedsmoothlora.data.found import Found, Kept, classes_of, labelled, named
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.data.splits import Splits
from fedsmoothlora.data.stored_audio import StoredAudio
from fedsmoothlora.data.table_files import has_table_suffix
from fedsmoothlora.data.tables import splits_in, tables_in
from fedsmoothlora.data.texts import Texts
from fedsmoothlora.errors import ConfigError

PACKAGED = "fedsmoothlora.data.packaged"

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


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
        declared: the order of labels that the training set itself declares, by column of labels and of lists.
    """

    train: Kept
    test: Kept | None
    client_of_row: list[str] | None = None
    file_of_row: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    label_names: tuple[str, ...] | None = None
    max_value: int | None = None
    form: str | None = None
    declared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, in the labels' order."""
        return self.train.classes

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the model's outputs, in their order; the classes unless the task says otherwise."""
        return self.classes if self.label_names is None else self.label_names


def load_rows(
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
        refuse(settings, "path", "revision", "subset", why="a local path has none")
        if not path.exists():
            raise ConfigError(f"data.source = {settings.source!r}: there is no such file or folder")
        by_split = splits_in(path)
        if not by_split:
            refuse(settings, "train_split", "test_split", why="its files name no splits")
    else:
        refuse(settings, "path", why="a hub data set has none")
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
    if is_local and settings.test is None and test_split is not None and test_split not in by_split:
        # Named by a file, which also belongs to a split.
        train_files, test_files = (tables_in(path, s)[0] for s in (settings.train_split, test_split))
        splits.refuse_shared_files(train_files, test_files, "data.train_split and data.test_split")
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
    classes = named(found, settings.classes) or classes_of(found)
    rows = _drawn("train_rows", len(found.places), settings.train_rows, seed)
    train = labelled(found, classes).take(rows)
    test = None
    if found_test is not None:
        test = labelled(found_test, classes)
        test = test.take(_drawn("test_rows", len(test), settings.test_rows, seed))
    elif settings.test_rows is not None:
        raise ConfigError(f"data.test_rows = {settings.test_rows}: there is no test set")
    return Data(
        train=train,
        test=test,
        client_of_row=_of_rows(found.clients, rows),
        file_of_row=_of_rows(found.files, rows),
        declared=found.declared,
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
    by_file = [split for split in (settings.train_split, test_split) if split not in {None, *by_split}]
    uses += [f"{split} (the file of this name) is {use(str(split))}" for split in by_file]
    return f"{path}: the files' names are names of splits: {', '.join(uses)}"


def load_test_rows(
    settings: DataSettings,
    classes: tuple[str, ...],
    empty: Callable[[tuple[str, ...]], Kept],
    load_alone: Callable[[DataSettings], Data[Kept]],
) -> Data[Kept]:
    """Load only the test rows, for a coordinator whose sites hold the training data.

    Raises ``ConfigError`` if ``classes`` is empty, and as ``load_alone`` does.
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
    data = load_alone(alone)
    return replace(data, train=empty(data.classes), test=data.train)


def load_packaged(settings: DataSettings, seed: int) -> Data[Kept]:
    """Load a packaged data set (``pkg:``).

    Raises:
        ConfigError: a key does not belong to packaged data, or there are fewer rows than asked for.
        PackageError: the package cannot be fetched.
    """
    columns, splits = ("image_column", "label_column"), ("train_split", "test_split", "test")
    keys = ("revision", "subset", *columns, *splits, "classes", "max_value")
    refuse(settings, *keys, why=f"{settings.source} has none")
    load = registry.find_packaged(settings.source, PACKAGED).load
    train, test = load() if settings.path is None else load(settings.path)
    return Data(
        train=train.take(_drawn("train_rows", len(train), settings.train_rows, seed)),
        test=test.take(_drawn("test_rows", len(test), settings.test_rows, seed)),
    )


# Forms of packaged rows, each with the task that it is for.
_FORMS: Mapping[str, str] = {
    "texts": "text-classification' or 'causal-lm",
    "images": "image-classification",
    "recordings": "audio-classification",
}


def check_form(settings: DataSettings, train: object, wanted: str) -> None:
    """Raise ``ConfigError`` for packaged rows of another form."""
    found = (
        "texts" if isinstance(train, Texts) else "recordings" if isinstance(train, StoredAudio) else "images"
    )
    if found != wanted:
        raise ConfigError(
            f"data.source = {settings.source!r} holds {found}, not {wanted}: set "
            f"task.kind = '{_FORMS[found]}'"
        )


def refuse(settings: DataSettings, *keys: str, why: str) -> None:
    """Refuse keys that are set but have no meaning for the source."""
    defaults = {part.name: part.default for part in fields(settings) if part.default is not MISSING}
    for key in keys:
        if (value := getattr(settings, key)) != defaults[key]:
            raise ConfigError(
                f"data.{key} = {value!r} does not belong to data.source = {settings.source!r}: {why}; leave "
                f"it out (on the command line: --set data.{key}=)"
            )


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
