"""Find the splits of a folder of tables by the names of files, as the Hugging Face hub does.

The rules and keywords are those of ``datasets.data_files``, except that case is ignored.
Source: https://huggingface.co/docs/hub/datasets-file-names-and-splits
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from fedsmoothlora.data.split_names import SPLITS, split_of, splits_named
from fedsmoothlora.errors import DataError

TRAIN, TEST = "train", "test"

_SHARDED = re.compile(r"(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5}[0-9]*\..*")

Splits = Mapping[str, Sequence[Path]]


def splits_by_name(root: Path, files: Sequence[Path]) -> Splits:
    """The files of each split; empty if the names of the files and of their folders name no split.

    These rules are tried in order, and the first that finds a split is applied to all files:
    ``SPLIT-00000-of-00001.*``, keywords in the names of folders below ``root``, keywords in the names of
    files. If no file is named as training data, files without a keyword are the training files; otherwise
    they belong to no split.

    Raises:
        DataError: a name has the keywords of two splits.
    """
    for rule in (_of_shard, lambda file: _of_folder(file.relative_to(root)), _of_name):
        found = _grouped(files, rule)
        if any(split_of(split) for split in found):
            break
    else:
        return {}
    if TRAIN not in found and rule is not _of_shard:
        named = {file for group in found.values() for file in group}
        found[TRAIN] = [file for file in files if file not in named]
    order = [*SPLITS, *sorted(found.keys() - set(SPLITS))]
    return {split: found[split] for split in order if found.get(split)}


def _grouped(files: Sequence[Path], split_of: Callable[[Path], str | None]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in files:
        if (split := split_of(file)) is not None:
            found.setdefault(split, []).append(file)
    return found


def _of_shard(file: Path) -> str | None:
    match = _SHARDED.fullmatch(file.name)
    return match[1] if match else None


def _of_folder(file: Path) -> str | None:
    """The split named by a folder of a relative path; a saved data set is itself a folder."""
    folders = file.parts if not file.suffix else file.parts[:-1]
    return _only(file, folders)


def _of_name(file: Path) -> str | None:
    return _only(file, [file.name])


def _only(file: Path, names: Iterable[str]) -> str | None:
    found = {split for name in names for split in splits_named(name)}
    if len(found) > 1:
        raise DataError(
            f"{file}: the name has the keywords of the splits {' and '.join(sorted(found))}; rename it"
        )
    return found.pop() if found else None


def chosen(root: Path, splits: Splits, split: str) -> Sequence[Path]:
    """The files of one split, or else the file of this name, such as ``validation_matched.jsonl``.

    Raises:
        DataError: there is no such split.
    """
    if split not in splits:
        if named := [file for files in splits.values() for file in files if _stem(file) == split]:
            return named
        raise DataError(
            f"{root}: by their names, the files belong to the splits {', '.join(splits)}; there is no "
            f"{split!r}. Set data.train_split and data.test_split, or name one file"
        )
    return splits[split]


def _stem(file: Path) -> str:
    """The name of a table without its suffixes, such as ``.csv.gz``; a saved data set is a folder."""
    return file.stem if file.suffix.lower() != ".gz" else Path(file.stem).stem


def refuse_shared_files(
    train: Iterable[Path], test: Iterable[Path], keys: str = "data.source and data.test"
) -> None:
    """Raise ``DataError`` if a file is both a training and a test file, even by links or other spellings."""
    trained = {_identity(file): file for file in train}
    for file in test:
        if (same := trained.get(_identity(file))) is not None:
            raise DataError(
                f"{file}: the file is both training and test data ({keys})"
                + (f"; it is the same as {same}" if same != file else "")
                + ". Move it out of the folder of the training data, or give data.source a single file"
            )


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino
