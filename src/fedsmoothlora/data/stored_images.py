"""Labelled images that are stored in files or as bytes in a table, and decoded when they are needed."""

from __future__ import annotations

import hashlib
import io
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fedsmoothlora.data.raw import PixelProcessor
from fedsmoothlora.errors import DataError

if TYPE_CHECKING:  # it takes a second to import
    import datasets

_REPORTED = 5  # unusable images that an error lists
_RANGES = (255, 4095, 65535)  # the largest values of 8, 12 and 16 bits


@dataclass(frozen=True, eq=False)
class StoredImages:
    """Labelled images of any size and format, decoded row by row with Pillow.

    Images are rotated by their EXIF orientation and converted to RGB. Transparent pixels are blended with
    white. The first frame of an animation is used. Values of more than 8 bits are scaled from
    ``0 ... max_value`` to 8 bits. All other steps are left to the model's image processor.

    Attributes:
        stored: a data set with one column, ``image``, of the feature ``datasets.Image(decode=False)``.
        folder: the folder to which paths in it are relative.
        labels: ``(images,)``, int64: the index of each image's class in ``classes``.
        classes: the classes' names, in the labels' order.
        places: the file, or the file and row, of each image, for errors.
        column: the column of the images, for errors; None for an image folder.
        max_value: the value of white in images of more than 8 bits.
    """

    stored: datasets.Dataset
    folder: Path
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    places: tuple[str, ...]
    column: str | None = None
    max_value: int = 65535

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    @property
    def channels(self) -> int:
        """Always 3."""
        return 3

    def image(self, row: int) -> Image.Image:
        """The image of a row, RGB.

        Raises ``DataError`` with the place of the image if it cannot be used.
        """
        try:
            return _rgb(*_decoded(self._content(row)), self.max_value)
        except ValueError as error:
            raise DataError(f"{self.where(row)}: {error}") from None

    def processed(self, rows: Sequence[int], processor: PixelProcessor) -> Tensor:
        """The rows' processed pixels, ``(rows, 3, height, width)``.

        Raises ``DataError`` with the place of an image that cannot be used.
        """
        pixels = torch.empty((len(rows), 3, *processor.size), dtype=processor.dtype)
        for place, row in enumerate(rows):
            image = self.image(int(row))
            try:
                pixels[place] = processor.process([image])[0]
            except ValueError as error:
                raise DataError(f"{self.where(int(row))}: {error}") from None
        return pixels

    def take(self, rows: NDArray[np.int64]) -> StoredImages:
        """These rows only, in the given order."""
        return replace(
            self,
            stored=self.stored.select(rows),
            labels=self.labels[rows],
            places=tuple(self.places[row] for row in rows),
        )

    def where(self, row: int) -> str:
        """The file of a row, or its file, row and column, for messages."""
        return self.places[row] + (f", column {self.column!r}" if self.column else "")

    def value_range(self) -> int | None:
        """The smallest of 255, 4095 and 65535 that no value of an image exceeds.

        Only readable images of more than 8 bits are considered; None if there are none.
        """
        highest = max(self._highest_values(), default=None)
        return None if highest is None else next(range for range in _RANGES if highest <= range)

    def files(self) -> Iterator[tuple[str, Path]]:
        """The images that are separate files, each with its name in the data and its path."""
        for batch in self.stored.iter(1000):
            for value in batch["image"]:
                if value and value["path"] and value["bytes"] is None:
                    yield value["path"], self.folder / value["path"]

    def verify(self) -> list[bytes]:
        """Open every image once.

        Returns a hash of the pixels of each image. Raises ``DataError`` if some cannot be used; the message
        lists the first of them with file, row and reason.
        """
        hashes: list[bytes] = []
        unusable = []
        for row in range(len(self)):
            try:
                hashes.append(_hash(self.image(row)))
            except DataError as error:
                unusable.append(str(error))
        if len(unusable) == 1:
            raise DataError(unusable[0])
        if unusable:
            listed = "\n  ".join(unusable[:_REPORTED])
            more = f"\n  and {len(unusable) - _REPORTED} more" if len(unusable) > _REPORTED else ""
            raise DataError(f"{len(unusable)} of {len(self)} images cannot be used:\n  {listed}{more}")
        return hashes

    def _highest_values(self) -> Iterator[int]:
        for row in range(len(self)):
            try:
                found = self._found(row)
                with Image.open(io.BytesIO(found) if isinstance(found, bytes) else found) as image:
                    if not _is_deep(image) and not _loses_bits(image):
                        continue
                decoded, upper_bits = _decoded(self._content(row))
            except Exception:
                continue
            highest = int(np.asarray(decoded).max())
            yield highest * 256 + 255 if upper_bits else highest

    def _content(self, row: int) -> bytes:
        """The image file's bytes. Raises ``DataError`` with the reason if they cannot be read."""
        found = self._found(row)
        try:
            # Pillow is given bytes, because it leaves a file open that it cannot read.
            content = found if isinstance(found, bytes) else found.read_bytes()
        except OSError as error:
            raise DataError(f"{str(found)!r} cannot be read: {error.strerror}") from None
        if not content:
            raise DataError("the image is empty: 0 bytes")
        return content

    def _found(self, row: int) -> bytes | Path:
        """The image file's bytes, or the path of the file. Raises ``DataError`` if there is neither."""
        value = self.stored[row]["image"] or {"bytes": None, "path": None}
        content: bytes | None = value["bytes"]
        if content is not None:
            return content
        if not value["path"]:
            raise DataError("there is no image; give its path or its bytes")
        path = self.folder / value["path"]
        check_regular(path)
        return path


def check_regular(path: Path) -> None:
    """Raise ``DataError`` for a file that is missing, and for devices, FIFOs and sockets.

    Devices, FIFOs and sockets are not opened, because opening them may block or have side effects.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DataError(f"there is no file {str(path)!r}") from None
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DataError(f"{str(path)!r} is a device, FIFO or socket; should be a file")


def _decoded(content: bytes) -> tuple[Image.Image, bool]:
    """The image, rotated by its EXIF orientation, and whether Pillow kept only the upper 8 of 16 bits."""
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        upper_bits = _loses_bits(image)
        image.load()
        image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise DataError(f"not an image that Pillow can read ({len(content)} bytes)") from None
    except Exception as error:  # the error's class depends on Pillow's reader
        raise DataError(f"the image cannot be read, perhaps it is cut off: {error}") from None
    if 0 in image.size:
        raise DataError(f"the image has no pixels: {image.width}×{image.height}")
    if image.mode in ("I", "F"):
        raise DataError("the image has 32 bits a pixel and no known range; save it with 8 or 16 bits")
    return image, upper_bits


def _is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits a pixel and Pillow keeps all of them."""
    return image.mode.startswith("I;16")


def _loses_bits(image: Image.Image) -> bool:
    """Whether Pillow keeps only the upper 8 of 16 bits a channel, as it does for colour images."""
    tiles = getattr(image, "tile", ())
    return not _is_deep(image) and any(";16" in str(tile.args) for tile in tiles)


def _rgb(image: Image.Image, upper_bits: bool, max_value: int) -> Image.Image:
    """The image as RGB.

    Raises ``DataError`` if a value is above ``max_value``, or the mode is unknown.
    """
    if upper_bits and max_value != _RANGES[-1]:
        raise DataError(
            f"a colour image of 16 bits a channel, of which Pillow reads only the upper 8; values from 0 to "
            f"{max_value} need the lower bits too. Save it with 8 bits a channel"
        )
    if _is_deep(image):
        image = _scaled(np.asarray(image).astype(np.int64), max_value)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise DataError(f"an image of mode {image.mode} cannot be converted to RGB: {error}") from None


def _scaled(values: NDArray[np.int64], max_value: int) -> Image.Image:
    # Pillow's own conversion clips values at 255 instead of scaling them.
    if (highest := int(values.max())) > max_value:
        raise DataError(
            f"a pixel has the value {highest}, and images of more than 8 bits are scaled from 0 ... "
            f"{max_value}; set data.max_value to the largest value of all training and test images"
        )
    return Image.fromarray((values * (255 / max_value)).round().astype(np.uint8))


def _hash(image: Image.Image) -> bytes:
    """A hash of size and pixels."""
    return hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
