"""Images as a model's input, prepared by the model's own image processor."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.raw import LabelledImages, PixelProcessor

_PROCESSED_AT_ONCE = 2048
_MEMORY = 1_000_000_000  # bytes


class ImageExamples:
    """Images prepared for a model, kept in memory if they fit.

    Args:
        images: the images.
        processor: the model's image processor.
        labels: the label of every image, ``(rows,)`` or ``(rows, labels)``; the number of its class unless
            given.
        memory: largest size in bytes of all prepared images together that is kept in memory. Larger sets are
            read and prepared batch by batch, every time a batch is used; the pixels are the same.
    """

    def __init__(
        self,
        images: LabelledImages,
        processor: PixelProcessor,
        memory: int = _MEMORY,
        *,
        labels: Tensor | None = None,
    ) -> None:
        self.labels = torch.from_numpy(images.labels.copy()) if labels is None else labels
        self._images, self._processor = images, processor
        shape = _shape(images, processor)
        fits = prod(shape) * processor.dtype.itemsize <= memory
        self._kept = _processed(images, processor, shape) if fits else None

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int]) -> Batch:
        """``pixel_values (rows, 3, height, width)``, float32 and normalised, and ``labels``."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        kept = self._kept
        found = self._images.processed(rows, self._processor) if kept is None else kept[index]
        return {"pixel_values": self._processor.normalised(found), "labels": self.labels[index]}


def _shape(images: LabelledImages, processor: PixelProcessor) -> tuple[int, ...]:
    """Shape of all processed images, ``(images, channels, height, width)``."""
    channels = images.channels if processor.dtype == torch.uint8 else 3
    return len(images), channels, *processor.size


def _processed(images: LabelledImages, processor: PixelProcessor, shape: tuple[int, ...]) -> Tensor:
    pixels = torch.empty(shape, dtype=processor.dtype)
    for start in range(0, len(images), _PROCESSED_AT_ONCE):
        rows = range(start, min(start + _PROCESSED_AT_ONCE, len(images)))
        pixels[rows.start : rows.stop] = images.processed(rows, processor)
    return pixels
