"""Images as a model wants them: its size, three channels, its mean and standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.raw import LabelledImages

_RESIZED_AT_ONCE = 2048
_MEMORY = 1_000_000_000  # bytes


@dataclass(frozen=True)
class ImageStatistics:
    """Mean and standard deviation of each channel that a model was pretrained with, pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class ImageExamples:
    """Images at the model's size, kept as bytes if they fit in memory; scaled to floats batch by batch.

    Args:
        images: the images.
        size: height and width that the model gets, in pixels.
        statistics: the model's mean and standard deviation.
        memory: most bytes that the resized images of the whole set may take. A larger set is read and
            resized batch by batch, each time anew; the pixels are the same.
    """

    def __init__(
        self, images: LabelledImages, size: int, statistics: ImageStatistics, memory: int = _MEMORY
    ) -> None:
        self.labels = torch.from_numpy(images.labels.copy())
        self._images, self._size = images, size
        fits = len(images) * images.channels * size * size <= memory
        self._kept = _resized(images, size) if fits else None  # (images, channels, size, size), uint8
        self._mean = torch.tensor(statistics.mean).view(1, -1, 1, 1) * 255
        self._std = torch.tensor(statistics.std).view(1, -1, 1, 1) * 255

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int]) -> Batch:
        """``pixel_values (rows, 3, size, size)``, float32 and normalised, and ``labels (rows,)``."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        found = self._images.resized(rows, self._size) if self._kept is None else self._kept[index]
        # Subtracting the three means turns one grey channel into three.
        pixels = (found.float() - self._mean) / self._std
        return {"pixel_values": pixels, "labels": self.labels[index]}


def _resized(images: LabelledImages, size: int) -> Tensor:
    """All images as ``(images, channels, size, size)`` bytes."""
    pixels = torch.empty((len(images), images.channels, size, size), dtype=torch.uint8)
    for start in range(0, len(images), _RESIZED_AT_ONCE):
        rows = range(start, min(start + _RESIZED_AT_ONCE, len(images)))
        pixels[rows.start : rows.stop] = images.resized(rows, size)
    return pixels
