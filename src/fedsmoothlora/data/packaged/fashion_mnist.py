"""70,000 pictures of clothes in ten classes, from the Debian package dataset-fashion-mnist."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.data.raw import RawImages
from fedsmoothlora.errors import PackageError


@dataclass(frozen=True)
class DebianPackage:
    """A Debian package, installed by the system's own tools.

    Attributes:
        name: the name for apt.
    """

    name: str

    @property
    def requirement(self) -> str:
        """The name, and that it is a Debian package."""
        return f"{self.name} (Debian)"


NAME = "fashion-mnist"
PACKAGE = DebianPackage("dataset-fashion-mnist")
# Debian's copyright file calls this licence Expat.
LICENCE = "MIT"
DESCRIPTION = (
    "70,000 pictures of clothes in ten classes, 28×28 grey: 60,000 to train on and 10,000 to test on."
)

FOLDER = Path("/usr/share/datasets/fashion-mnist")
# In the order of the labels, as in the package's README.md.
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

_UNSIGNED_BYTES = b"\0\0\x08"  # an IDX file's first three bytes; the fourth is the number of dimensions


def load(path: str | None = None) -> tuple[RawImages, RawImages]:
    """The training and the test set, as they were published.

    Args:
        path: the folder with the four files; the package's own folder unless given.

    Raises:
        PackageError: a file is missing or wrong.
    """
    folder = FOLDER if path is None else Path(path).expanduser()
    if not folder.is_dir():
        raise PackageError(f"there is no folder {folder}; {_how_to_get()}")
    return _load(folder, "train"), _load(folder, "t10k")


def _load(folder: Path, part: str) -> RawImages:
    images, labels = folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte"
    pixels, numbers = _read_idx(images, 3), _read_idx(labels, 1)
    try:
        return RawImages(pixels, numbers.astype(np.int64), CLASSES)
    except ValueError as error:
        raise PackageError(f"{images} and {labels.name}: {error}") from None


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an IDX file of bytes, compressed by gzip (with suffix ``.gz``) or not."""
    packed = path.with_name(f"{path.name}.gz")
    try:
        if packed.is_file():
            path, content = packed, gzip.decompress(packed.read_bytes())
        else:
            content = path.read_bytes()
    except FileNotFoundError:
        raise PackageError(f"there is no file {packed}, nor without .gz; {_how_to_get()}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise PackageError(f"{packed if packed.is_file() else path} cannot be read: {error}") from None
    magic = _UNSIGNED_BYTES + bytes([dimensions])
    if content[:4] != magic:
        raise PackageError(f"{path} begins with the bytes {content[:4].hex()}; should be {magic.hex()}")
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise PackageError(f"{path} is cut off: it ends within its header, after {len(content)} bytes")
    shape = [int(size) for size in np.frombuffer(content[4:start], dtype=">u4")]
    expected = start + math.prod(shape)
    if len(content) != expected:
        fault = "is cut off" if len(content) < expected else "has bytes after its end"
        raise PackageError(
            f"{path} {fault}: {len(content)} bytes, should be {expected} for {'×'.join(map(str, shape))}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()


def _how_to_get() -> str:
    return (
        f"run `apt-get install {PACKAGE.name}` (Debian, Ubuntu); or, without root, "
        f"`apt-get download {PACKAGE.name}` and `dpkg -x {PACKAGE.name}_*.deb somewhere`, and set "
        f"data.path = 'somewhere{FOLDER}'"
    )
