"""Image folders with a folder for each split: ``train/``, ``test/``, ``val2017/`` and the like."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedsmoothlora.data.leftovers import folders_in
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.data.split_names import Split, split_of
from fedsmoothlora.errors import DataError


def split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split; empty unless all folders of ``root`` have names of splits.

    The folders may be in a folder ``data``, as in data sets that were downloaded from the hub.

    Raises:
        DataError: two folders have names of the same split.
    """
    folders = folders_in(root)
    if [folder.name for folder in folders] == ["data"]:
        folders = folders_in(folders[0])
    found: dict[str, Path] = {}
    for folder in folders:
        split: Split | None = split_of(folder.name)
        if split is None:
            return {}
        if split in found:
            raise DataError(
                f"{root}: the folders {found[split].name} and {folder.name} both look like the {split} "
                "split; name one of them in data.source or data.test"
            )
        found[split] = folder
    return found


def resolved(settings: DataSettings) -> tuple[DataSettings, list[str]]:
    """Replace a folder of splits in ``data.source`` and ``data.test`` by the split to be read.

    The split of ``data.train_split`` becomes the training set. The split of ``data.test_split``, or ``test``
    unless that key is set, becomes the test set. Other sources are not changed.

    Returns:
        The settings, and a note on the splits if ``data.source`` has some.

    Raises:
        DataError: a named split is missing.
    """
    if settings.test is not None:
        settings = replace(settings, test=_test_folder(settings.test))
    source = Path(settings.source).expanduser()
    splits = split_folders(source) if source.is_dir() else {}
    if not splits:
        return settings, []
    train = _asked_for(source, splits, settings.train_split, "data.train_split")
    used = {train: "the training set"}
    if settings.test is None:
        asked = settings.test_split
        test = splits.get("test") if asked is None else _asked_for(source, splits, asked, "data.test_split")
        if test is not None:
            settings = replace(settings, test=str(test), test_split=None)
            used[test] = "the test set"
    listed = ", ".join(f"{folder.name} is {used.get(folder, 'not read')}" for folder in splits.values())
    note = f"{source}: the folders are splits of the data set: {listed}"
    return replace(settings, source=str(train), train_split=DataSettings.train_split), [note]


def _test_folder(path: str) -> str:
    """The folder of the test split, or of the only split, if the path is a folder of splits."""
    root = Path(path).expanduser()
    splits = split_folders(root) if root.is_dir() else {}
    if not splits:
        return path
    if "test" in splits:
        return str(splits["test"])
    if len(splits) > 1:
        raise DataError(f"{root}: there is no test split; name one of {', '.join(splits)} in data.test")
    return str(next(iter(splits.values())))


def _asked_for(root: Path, splits: dict[str, Path], split: str, key: str) -> Path:
    if split not in splits:
        raise DataError(
            f"{root}: there is no folder of the split {split!r} ({key}); there are {', '.join(splits)}"
        )
    return splits[split]
