"""Labelled images in files, or as bytes in a table, decoded when they are wanted."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fedsmoothlora.errors import DataError

if TYPE_CHECKING:  # it takes a second to import
    import datasets

_REPORTED = 5  # unusable images that an error lists


@dataclass(frozen=True, eq=False)
class StoredImages:
    """Labelled images of any size and kind, decoded row by row with Pillow.

    An image is turned as its EXIF orientation says and becomes RGB: grey and palette images are converted,
    transparent pixels are laid on white, 16 bits a pixel are scaled to 8. Its shorter side is resized to the
    wanted size, bicubic, and the middle of the longer side is kept.

    Attributes:
        stored: one column, ``image``, of the feature ``datasets.Image(decode=False)``.
        folder: where relative paths in it start.
        labels: ``(images,)``; int64, each the place of its class in ``classes``.
        classes: the classes' names, in the labels' order.
        places: where each row comes from, for errors: a file, or a file and a row.
        column: the column that the images come from, for errors; None if each is a file of an image folder.
    """

    stored: datasets.Dataset
    folder: Path
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    places: tuple[str, ...]
    column: str | None = None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    @property
    def channels(self) -> int:
        """Always 3."""
        return 3

    def resized(self, rows: Sequence[int], size: int) -> Tensor:
        """The rows as ``(rows, 3, size, size)`` bytes.

        Raises ``DataError`` that names the place of an image that cannot be used.
        """
        pixels = torch.empty((len(rows), 3, size, size), dtype=torch.uint8)
        for place, row in enumerate(rows):
            try:
                image = _rgb(_decoded(self._content(int(row))))
            except ValueError as error:
                raise DataError(f"{self._where(int(row))}: {error}") from None
            fitted = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            pixels[place] = torch.from_numpy(np.array(fitted)).permute(2, 0, 1)
        return pixels

    def take(self, rows: NDArray[np.int64]) -> StoredImages:
        """These rows only, in the given order."""
        return replace(
            self,
            stored=self.stored.select(rows),
            labels=self.labels[rows],
            places=tuple(self.places[row] for row in rows),
        )

    def files(self) -> Iterator[tuple[str, Path]]:
        """The images that are files of their own: the name that the data have for each, and its path."""
        for batch in self.stored.iter(1000):
            for value in batch["image"]:
                if value and value["path"] and value["bytes"] is None:
                    yield value["path"], self.folder / value["path"]

    def verify(self) -> None:
        """Open every image once.

        Raises ``DataError`` that lists the first images that cannot be used, with file, row and reason.
        """
        unusable = list(self._unusable())
        if len(unusable) == 1:
            raise DataError(unusable[0])
        if unusable:
            listed = "\n  ".join(unusable[:_REPORTED])
            more = f"\n  and {len(unusable) - _REPORTED} more" if len(unusable) > _REPORTED else ""
            raise DataError(f"{len(unusable)} of {len(self)} images cannot be used:\n  {listed}{more}")

    def _unusable(self) -> Iterator[str]:
        for row in range(len(self)):
            try:
                _decoded(self._content(row), quick=True)
            except ValueError as error:
                yield f"{self._where(row)}: {error}"

    def _where(self, row: int) -> str:
        return self.places[row] + (f", column {self.column!r}" if self.column else "")

    def _content(self, row: int) -> bytes:
        """The image file's bytes. Raises ``DataError`` that says why there are none."""
        value = self.stored[row]["image"] or {"bytes": None, "path": None}
        content: bytes | None = value["bytes"]
        if content is None:
            if not value["path"]:
                raise DataError("there is no image; give its path or its bytes")
            path = self.folder / value["path"]
            try:
                # Not left to Pillow, which keeps a file open that it cannot read.
                content = path.read_bytes()
            except FileNotFoundError:
                raise DataError(f"there is no file {str(path)!r}") from None
            except OSError as error:
                raise DataError(f"{str(path)!r} cannot be read: {error.strerror}") from None
        if not content:
            raise DataError("the image is empty: 0 bytes")
        return content


def _decoded(content: bytes, quick: bool = False) -> Image.Image:
    """The image with its pixels; ``quick`` is enough to tell whether it can be read to its end."""
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        if quick:
            # A JPEG is read to its end all the same, but only an eighth of its width is computed.
            image.draft(None, (1, 1))
        image.load()
        image = image if quick else ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise DataError(f"not an image that Pillow can read ({len(content)} bytes)") from None
    except Exception as error:  # each of Pillow's readers has its own
        raise DataError(f"the image cannot be read, perhaps it is cut off: {error}") from None
    if 0 in image.size:
        raise DataError(f"the image has no pixels: {image.width}×{image.height}")
    if image.mode in ("I", "F"):
        raise DataError("the image has 32 bits a pixel and no known range; save it with 8 or 16 bits")
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """The image as RGB."""
    if image.mode.startswith("I;16"):
        # Pillow's own conversion cuts off at 255 instead of scaling.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise DataError(f"an image of mode {image.mode} cannot be converted to RGB: {error}") from None
