"""Recognise names of files and folders that name a split, by the rules of the Hugging Face hub."""

from __future__ import annotations

import re
from typing import Literal

Split = Literal["train", "validation", "test"]

# The hub's keywords; see `datasets.data_files` in the library.
_KEYWORDS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATOR = "[-._ 0-9]"


SPLITS: tuple[Split, ...] = tuple(_KEYWORDS)


def splits_named(name: str) -> list[Split]:
    """The splits whose keywords are in a name.

    Keywords such as ``train`` must be separated from other letters by ``-``, ``.``, ``_``, a space or a
    digit: ``train2017``, ``my-test`` and ``val_images`` are names of splits, ``trains`` is not. Case is
    ignored.
    """
    return [
        split
        for split, keywords in _KEYWORDS.items()
        if re.search(rf"(?:^|{_SEPARATOR})(?:{'|'.join(keywords)})(?:$|{_SEPARATOR})", name.lower())
    ]


def split_of(name: str) -> Split | None:
    """The split of a name, the first if it has keywords of several; None if it has no keyword."""
    return next(iter(splits_named(name)), None)


def is_split_alone(name: str) -> bool:
    """Whether a name consists of a keyword and separators only, such as ``test`` and ``val2017``.

    Such a name is unlikely to be a class, while ``test tube`` may be one.
    """
    words = "|".join(word for keywords in _KEYWORDS.values() for word in keywords)
    return re.fullmatch(rf"{_SEPARATOR}*(?:{words}){_SEPARATOR}*", name.lower()) is not None
