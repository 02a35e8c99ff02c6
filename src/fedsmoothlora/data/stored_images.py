"""Labelled images that are stored in files or as bytes in a table, and decoded when they are needed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fedsmoothlora.data.raw import PixelProcessor
from fedsmoothlora.data.stored_files import StoredFiles
from fedsmoothlora.errors import DataError

_RANGES = (255, 4095, 65535)  # the largest values of 8, 12 and 16 bits


@dataclass(frozen=True, eq=False)
class StoredImages(StoredFiles):
    """Labelled images of any size and format, decoded row by row with Pillow.

    Images are rotated by their EXIF orientation and converted to RGB. Transparent pixels are blended with
    white. The first frame of an animation is used. Values of more than 8 bits are scaled from
    ``0 ... max_value`` to 8 bits. All other steps are left to the model's image processor.

    Attributes:
        max_value: the value of white in images of more than 8 bits.
    """

    item: ClassVar[str] = "image"
    plural: ClassVar[str] = "images"

    max_value: int = 65535

    @staticmethod
    def suffixes() -> Collection[str]:
        """The suffixes that ``datasets`` knows."""
        from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

        suffixes: Collection[str] = ImageFolder.EXTENSIONS
        return suffixes

    @staticmethod
    def feature() -> Any:
        """Images that are not decoded."""
        from fedsmoothlora.data.datasets_library import datasets

        return datasets.Image(decode=False)

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

    def digest(self, row: int) -> bytes:
        """A hash of an image's size and pixels."""
        return _hash(self.image(row))

    def value_range(self) -> int | None:
        """The smallest of 255, 4095 and 65535 that no value of an image exceeds.

        Only readable images of more than 8 bits are considered; None if there are none.
        """
        highest = max(self._highest_values(), default=None)
        return None if highest is None else next(range for range in _RANGES if highest <= range)

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
