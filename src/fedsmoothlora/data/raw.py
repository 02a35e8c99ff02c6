"""Labelled rows, and images as they were published, before partitioning and preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.errors import DataError

if TYPE_CHECKING:  # packaged data sets import this module, even if they are only listed
    import torch
    from PIL import Image
    from torch import Tensor


class LabelledRows(Protocol):
    """Images or texts, each with a class."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """``(rows,)``: the index of each row's class in ``classes``."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, in the labels' order."""
        ...

    def __len__(self) -> int: ...

    def take(self, rows: NDArray[np.int64]) -> Self:
        """These rows only, in the given order."""
        ...


class PixelProcessor(Protocol):
    """Turns images into pixels of one size, in two steps. The second is cheap and is done for each batch.

    Attributes:
        size: height and width of the pixels.
        dtype: type of the pixels after the first step: uint8, or float32 if that step includes everything.
    """

    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def process(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images as ``(images, 3, height, width)`` of ``dtype``: resized and cropped.

        Raises ``DataError`` if the processor gives an image another size.
        """
        ...

    def leaves_unchanged(self, height: int, width: int) -> bool:
        """Whether `process` returns images of this size unchanged."""
        ...

    def normalised(self, pixels: Tensor) -> Tensor:
        """The model's input, ``(rows, 3, ...)``, from processed pixels, ``(rows, 1 or 3, height, width)``."""
        ...


class LabelledImages(LabelledRows, Protocol):
    """Images, each with a class, which are kept in memory or read when they are needed."""

    @property
    def channels(self) -> int:
        """1 if all images are grey, else 3."""
        ...

    def processed(self, rows: Sequence[int], processor: PixelProcessor) -> Tensor:
        """The rows' pixels, ``(rows, channels, height, width)``; floats always have three channels.

        The pixels of a row do not depend on the other rows.
        """
        ...


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class RawImages:
    """Labelled images of one size.

    Attributes:
        pixels: ``(images, height, width)`` if grey, or ``(images, height, width, 3)``; uint8, 0 to 255.
        labels: ``(images,)``, int64: the index of each image's class in ``classes``.
        classes: The classes' names, in the labels' order.
        lists: Lists of texts of each image, such as its labels if it may have several, by column.

    Raises:
        DataError: A shape, a length or a type is wrong, or a label is not the index of a class.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    lists: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)

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
        for name, values in self.lists.items():
            if len(values) != len(self.labels):
                raise DataError(f"column {name!r} has {len(values)} rows, and there are {len(self)} images")
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
    def columns(self) -> Mapping[str, Sequence[str]]:
        """Columns of texts; there are none."""
        return {}

    @property
    def channels(self) -> int:
        """1 if the images are grey, else 3."""
        return 1 if self.pixels.ndim == 3 else 3

    def place(self, row: int) -> str:
        """The number of a row, for messages."""
        return f"row {row + 1}"

    def processed(self, rows: Sequence[int], processor: PixelProcessor) -> Tensor:
        """The rows' processed pixels, ``(rows, channels, height, width)``."""
        import torch
        from PIL import Image

        pixels = self.pixels[np.asarray(rows, dtype=np.int64)]
        if processor.leaves_unchanged(*pixels.shape[1:3]):
            tensor = torch.from_numpy(pixels)
            return tensor.unsqueeze(1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()
        found = processor.process([Image.fromarray(one).convert("RGB") for one in pixels])
        # The bytes of a grey image are the same in all channels; normalised floats are not.
        return found[:, : self.channels] if found.dtype == torch.uint8 else found

    def take(self, rows: NDArray[np.int64]) -> RawImages:
        """These rows only, in the given order."""
        lists = {name: [values[row] for row in rows] for name, values in self.lists.items()}
        return RawImages(self.pixels[rows], self.labels[rows], self.classes, lists)
