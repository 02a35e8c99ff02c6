"""Images as a model wants them: its size, three channels, its mean and standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.raw import RawImages

_RESIZED_AT_ONCE = 2048


@dataclass(frozen=True)
class ImageStatistics:
    """Mean and standard deviation of each channel that a model was pretrained with, pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class ImageExamples:
    """Decoded images kept as bytes at the model's size; scaled to floats batch by batch.

    Args:
        images: the raw images.
        size: height and width that the model gets, in pixels.
        statistics: the model's mean and standard deviation.
    """

    def __init__(self, images: RawImages, size: int, statistics: ImageStatistics) -> None:
        self.labels = torch.from_numpy(images.labels.copy())
        self._pixels = _resize(images, size)  # (images, channels, size, size), uint8
        self._mean = torch.tensor(statistics.mean).view(1, -1, 1, 1) * 255
        self._std = torch.tensor(statistics.std).view(1, -1, 1, 1) * 255

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int]) -> Batch:
        """``pixel_values (rows, 3, size, size)``, float32 and normalised, and ``labels (rows,)``."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        # Subtracting the three means turns one grey channel into three.
        pixels = (self._pixels[index].float() - self._mean) / self._std
        return {"pixel_values": pixels, "labels": self.labels[index]}


def _resize(images: RawImages, size: int) -> Tensor:
    """Images as ``(images, channels, size, size)`` bytes, bicubic with antialiasing as Pillow does."""
    pixels = torch.from_numpy(images.pixels.copy())
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    if pixels.shape[-2:] == (size, size):
        return pixels.contiguous()
    resized = [
        functional.interpolate(
            part.float(), (size, size), mode="bicubic", antialias=True, align_corners=False
        )
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
        for part in pixels.split(_RESIZED_AT_ONCE)
    ]
    return torch.cat(resized)
