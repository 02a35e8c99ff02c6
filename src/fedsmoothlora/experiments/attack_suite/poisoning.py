"""Changed training rows: other labels, and triggers in images and texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsmoothlora.data.examples import Batch, Examples
from fedsmoothlora.data.raw import LabelledImages, LabelledRows, PixelProcessor
from fedsmoothlora.data.texts import Texts


@dataclass(frozen=True, eq=False)
class Relabelled:
    """Other examples with labels of their own.

    Attributes:
        examples: the examples.
        labels: ``(rows,)``, int64.
    """

    examples: Examples
    labels: Tensor

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def lengths(self) -> list[int] | None:
        """Tokens of each row, where the examples know them."""
        return getattr(self.examples, "lengths", None)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows as one batch, with the other labels."""
        return {**self.examples.batch(rows), "labels": self.labels[torch.as_tensor(rows)]}


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """A mark on an image or in a text.

    Attributes:
        patch: the side of the white square at the lower right of an image, as a share of its height.
        word: the word before a text.
    """

    patch: float
    word: str

    def stamped(
        self, rows: LabelledRows, chosen: NDArray[np.bool_], labels: NDArray[np.int64]
    ) -> LabelledRows:
        """The rows with other labels, and the trigger on some of them.

        Args:
            rows: images or texts.
            chosen: ``(rows,)``, the rows that get the trigger.
            labels: ``(rows,)``.
        """
        if not isinstance(rows, Texts):
            images: Any = rows  # the other rows of a task are images
            return StampedImages(images=images, chosen=chosen, labels=labels, patch=self.patch)
        column, texts = next(iter(rows.columns.items()))
        marked = [f"{self.word} {text}" if mark else text for text, mark in zip(texts, chosen, strict=True)]
        return replace(rows, columns={**rows.columns, column: marked}, labels=labels)


@dataclass(frozen=True, kw_only=True, eq=False)
class StampedImages:
    """Images with labels of their own, some of them with a white square at the lower right.

    Attributes:
        images: the images.
        chosen: ``(rows,)``, the images that have the square.
        labels: ``(rows,)``, int64.
        patch: the side of the square, as a share of the processed image's height; at least one pixel.
    """

    images: LabelledImages
    chosen: NDArray[np.bool_]
    labels: NDArray[np.int64]
    patch: float

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the images."""
        return self.images.classes

    @property
    def channels(self) -> int:
        """The channels of the images."""
        return self.images.channels

    def processed(self, rows: Sequence[int], processor: PixelProcessor) -> Tensor:
        """The rows' pixels with their squares: 255 in bytes, an image's own largest value in floats."""
        pixels = self.images.processed(rows, processor).clone()
        side = max(1, round(self.patch * pixels.shape[-2]))
        for place, row in enumerate(rows):
            if self.chosen[row]:
                image = pixels[place]
                white = 255 if image.dtype == torch.uint8 else image.amax()
                image[:, -side:, -side:] = white
        return pixels

    def take(self, rows: NDArray[np.int64]) -> StampedImages:
        """These rows only, in the given order."""
        return replace(
            self, images=self.images.take(rows), chosen=self.chosen[rows], labels=self.labels[rows]
        )
