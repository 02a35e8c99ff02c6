"""Labelled images as they were published, before any split among clients and any preprocessing."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class RawImages:
    """Labelled images of one size.

    Attributes:
        pixels: ``(images, height, width)`` if grey, or ``(images, height, width, 3)``; uint8, 0 to 255.
        labels: ``(images,)``; int64, each the place of its class in ``classes``.
        classes: The classes' names, in the labels' order.

    Raises:
        ValueError: A shape, a length or a type is wrong, or a label names no class.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = self.pixels.shape
        if len(shape) != 3 and not (len(shape) == 4 and shape[3] == 3):
            raise ValueError(
                f"pixels have the shape {shape}; "
                f"should be (images, height, width) or (images, height, width, 3)"
            )
        if self.pixels.dtype != np.uint8:
            raise ValueError(f"pixels are {self.pixels.dtype}; should be uint8")
        if self.labels.dtype != np.int64 or self.labels.ndim != 1:
            raise ValueError(
                f"labels are {self.labels.dtype} of shape {self.labels.shape}; "
                f"should be int64 of shape (images,)"
            )
        if len(self.labels) != len(self.pixels):
            shorter = min(len(self.labels), len(self.pixels))
            lacking = "label" if len(self.labels) < len(self.pixels) else "image"
            raise ValueError(
                f"{len(self.pixels)} images and {len(self.labels)} labels: row {shorter} has no {lacking}"
            )
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"row {row} has the label {self.labels[row]}; "
                f"should be 0 to {len(self.classes) - 1}, one of {len(self.classes)} classes"
            )

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)
