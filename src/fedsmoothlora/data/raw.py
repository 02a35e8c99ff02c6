"""Labelled rows, and images as they were published, before any split among clients or preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.errors import DataError

if TYPE_CHECKING:  # packaged data sets import this module, also where they are only listed
    from torch import Tensor


class LabelledRows(Protocol):
    """Rows with a class each: images, or texts."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """``(rows,)``: each the place of its class in ``classes``."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, in the labels' order."""
        ...

    def __len__(self) -> int: ...

    def take(self, rows: NDArray[np.int64]) -> Self:
        """These rows only, in the given order."""
        ...


class LabelledImages(LabelledRows, Protocol):
    """Images with a class each, kept in memory or read when they are wanted."""

    @property
    def channels(self) -> int:
        """1 if all images are grey, else 3."""
        ...

    def resized(self, rows: Sequence[int], size: int) -> Tensor:
        """The rows' pixels, ``(rows, channels, size, size)``, uint8; a row's do not depend on the others."""
        ...


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class RawImages:
    """Labelled images of one size.

    Attributes:
        pixels: ``(images, height, width)`` if grey, or ``(images, height, width, 3)``; uint8, 0 to 255.
        labels: ``(images,)``; int64, each the place of its class in ``classes``.
        classes: The classes' names, in the labels' order.

    Raises:
        DataError: A shape, a length or a type is wrong, or a label names no class.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if len(shape) != 3 and not (len(shape) == 4 and shape[3] == 3):
            raise DataError(
                f"pixels have the shape {shape}; "
                f"should be (images, height, width) or (images, height, width, 3)"
            )
        if self.pixels.dtype != np.uint8:
            raise DataError(f"pixels are {self.pixels.dtype}; should be uint8")
        if self.labels.dtype != np.int64 or self.labels.ndim != 1:
            raise DataError(
                f"labels are {self.labels.dtype} of shape {self.labels.shape}; "
                f"should be int64 of shape (images,)"
            )
        if len(self.labels) != len(self.pixels):
            shorter = min(len(self.labels), len(self.pixels))
            lacking = "label" if len(self.labels) < len(self.pixels) else "image"
            raise DataError(
                f"{len(self.pixels)} images and {len(self.labels)} labels: row {shorter} has no {lacking}"
            )
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"row {row} has the label {self.labels[row]}; "
                f"should be 0 to {len(self.classes) - 1}, one of {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    @property
    def channels(self) -> int:
        """1 if the images are grey, else 3."""
        return 1 if self.pixels.ndim == 3 else 3

    def resized(self, rows: Sequence[int], size: int) -> Tensor:
        """The rows as ``(rows, channels, size, size)`` bytes: bicubic with antialiasing."""
        import torch
        from PIL import Image

        pixels = self.pixels[np.asarray(rows, dtype=np.int64)]
        if pixels.shape[1:3] != (size, size):
            # Pillow, as transformers' image processors do, image by image: torch's own bytes differ.
            resized = [Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC) for one in pixels]
            pixels = np.stack([np.asarray(image) for image in resized])
        tensor = torch.from_numpy(pixels)
        return tensor.unsqueeze(1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()

    def take(self, rows: NDArray[np.int64]) -> RawImages:
        """These rows only, in the given order."""
        return RawImages(self.pixels[rows], self.labels[rows], self.classes)
