"""Names of files and folders that stand for a split of a data set, by the rules of the Hugging Face hub."""

from __future__ import annotations

import re
from typing import Literal

Split = Literal["train", "validation", "test"]

# The hub's keywords; `datasets.data_files` in the library.
_KEYWORDS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SEPARATOR = "[-._ 0-9]"


def split_of(name: str) -> Split | None:
    """The split that a name stands for; None if it stands for none.

    A keyword such as ``train`` counts between separators (``-``, ``.``, ``_``, a space, a digit):
    ``train2017``, ``my-test`` and ``val_images`` are names of splits, ``trains`` is not. Upper and lower case
    are the same.
    """
    for split, keywords in _KEYWORDS.items():
        words = "|".join(keywords)
        if re.search(rf"(?:^|{_SEPARATOR})(?:{words})(?:$|{_SEPARATOR})", name.lower()):
            return split
    return None


def is_split_alone(name: str) -> bool:
    """Whether a name is nothing but a keyword and separators, as ``test`` and ``val2017``.

    Such a name is hardly that of a class, while ``test tube`` may well be one.
    """
    words = "|".join(word for keywords in _KEYWORDS.values() for word in keywords)
    return re.fullmatch(rf"{_SEPARATOR}*(?:{words}){_SEPARATOR}*", name.lower()) is not None
