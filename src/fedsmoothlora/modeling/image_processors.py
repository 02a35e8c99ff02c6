"""The image processor of a checkpoint: how its images are resized, cropped and normalised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fedsmoothlora.errors import ConfigError, DataError
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.modeling.settings import ModelSettings

_PLAIN_SIZE = 224
_LAST_STEPS = ("do_rescale", "do_normalize")


class ImageProcessor:
    """An image processor of transformers, run with NumPy and Pillow.

    Most processors rescale and normalise last. For these, pixels are stored as bytes before the two steps,
    which are applied to each batch in float32, as in transformers' own torchvision processors:
    ``(bytes - mean / rescale_factor) / (std / rescale_factor)``. For other processors, such as
    EfficientNet's, all steps run at once and pixels are stored as floats.

    Args:
        processor: the processor, set to its final sizes.
        size: height and width of its pixels.

    Attributes:
        size: height and width of its pixels.
    """

    def __init__(self, processor: Any, size: tuple[int, int]) -> None:
        self.size = size
        self._processor = processor
        self._unchanged: dict[tuple[int, int], bool] = {}
        # In some releases, a processor without a step has no such attribute, and refuses the argument.
        self._bytes = {step: False for step in _LAST_STEPS if hasattr(processor, step)}
        rescales, normalises = (getattr(processor, step, False) for step in _LAST_STEPS)
        levels = 1 / processor.rescale_factor if rescales else 1.0  # 1 / 255 gives 255 exactly
        mean, std = (processor.image_mean, processor.image_std) if normalises else (0.0, 1.0)
        self._mean = torch.tensor(mean).view(1, -1, 1, 1) * levels
        self._std = torch.tensor(std).view(1, -1, 1, 1) * levels

    @cached_property
    def dtype(self) -> torch.dtype:
        """uint8 if pixels are stored as bytes, float32 if all steps of the processor run at once."""
        image = _noise(*self.size)
        whole = self._run([image])
        try:
            found = self._run([image], **self._bytes)
        except (TypeError, ValueError):  # the processor has other steps
            return torch.float32
        if found.dtype != np.uint8 or found.shape != whole.shape:
            return torch.float32
        same = np.allclose(self._affine(torch.from_numpy(found)), whole, rtol=1e-5, atol=1e-5)
        return torch.uint8 if same else torch.float32

    def process(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images as ``(images, 3, height, width)``: bytes, or normalised floats (``dtype``).

        Raises ``DataError`` if the processor gives an image another size.
        """
        if not images:
            return torch.empty((0, 3, *self.size), dtype=self.dtype)
        return torch.from_numpy(self._run(images, **(self._bytes if self.dtype == torch.uint8 else {})))

    def leaves_unchanged(self, height: int, width: int) -> bool:
        """Whether `process` returns images of this size unchanged.

        Resizing and cropping depend on the size alone, so one image of noise is tried.
        """
        key = height, width
        if key not in self._unchanged:
            image = _noise(height, width)
            self._unchanged[key] = (
                key == self.size
                and self.dtype == torch.uint8
                and np.array_equal(self.process([image])[0].permute(1, 2, 0), np.asarray(image))
            )
        return self._unchanged[key]

    def normalised(self, pixels: Tensor) -> Tensor:
        """The model's input from processed pixels, float32."""
        return self._affine(pixels) if self.dtype == torch.uint8 else pixels

    def save(self, folder: Path) -> None:
        """Write ``preprocessor_config.json``, from which ``AutoImageProcessor`` loads the same processor."""
        self._processor.save_pretrained(folder)

    def _affine(self, pixels: Tensor) -> Tensor:
        # Grey images have one channel, which is repeated three times.
        return ((pixels.float() - self._mean) / self._std).expand(-1, 3, -1, -1)

    def _run(self, images: Sequence[Image.Image], **steps: bool) -> NDArray[Any]:
        """``(images, 3, height, width)``."""
        found = self._processor(list(images), **steps)["pixel_values"]
        for one in found:
            if one.shape[1:] != self.size:
                raise DataError(
                    f"the model's image processor makes {one.shape[1]}×{one.shape[2]} pixels of this image; "
                    f"should be {self.size[0]}×{self.size[1]}: resize the image first"
                )
        return np.stack(found)


def load_image_processor(settings: ModelSettings, files: Mapping[str, Any]) -> ImageProcessor:
    """The image processor of a checkpoint.

    If the checkpoint has none, the shorter side is resized to ``model.image_size`` (bicubic), the centre is
    cropped, and pixels are scaled to the range from -1 to 1. If ``model.image_size`` differs from the
    processor's own size, the processor resizes and crops to ``model.image_size`` instead.

    Args:
        settings: ``[model]``.
        files: the arguments of ``from_pretrained`` that name the checkpoint.

    Raises:
        ConfigError: transformers cannot run the processor with NumPy and Pillow alone, it returns other
            inputs beside pixels, or it cannot be set to ``model.image_size``.
    """
    source, wanted = settings.source, settings.image_size
    processor = _load(source, files) or _plain(wanted or _PLAIN_SIZE)
    kind = type(processor).__name__.removesuffix("Pil")
    try:
        size = _output_size(processor)
        if wanted is not None and size != (wanted, wanted):
            processor = type(processor).from_dict(_with_size(processor.to_dict(), wanted))
            size = _output_size(processor) or (wanted, wanted)
        if size is None:
            raise ConfigError(
                f"model.image_size is missing: {kind}, the image processor of {source}, does not bring "
                "images to one size"
            )
        if wanted is not None and size != (wanted, wanted):
            raise ConfigError(
                f"model.image_size = {wanted}: {kind}, the image processor of {source}, makes "
                f"{size[0]}×{size[1]} pixels, whatever size it is set to; leave image_size out"
            )
        found = ImageProcessor(processor, size)
        _ = found.dtype  # runs the processor once, so that a failure is found here
    except ConfigError:
        raise
    except Exception as error:  # the error's class depends on the processor
        raise ConfigError(
            f"model.source = {source!r}: its image processor, {kind}, cannot be used: {_first_line(error)}"
        ) from None
    return found


def plain_image_processor(size: int) -> ImageProcessor:
    """The image processor for checkpoints that have none; ``size`` is the height and width of its pixels."""
    return ImageProcessor(_plain(size), (size, size))


def _load(source: str, files: Mapping[str, Any]) -> Any:
    """The checkpoint's own processor; None if it has none."""
    # From its own module: in some releases, transformers' own name needs torchvision.
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from fedsmoothlora.modeling.versions import with_pillow

    try:
        ImageProcessingMixin.get_image_processor_dict(**files)
    except OSError as error:
        if (Path(files["pretrained_model_name_or_path"]) / "preprocessor_config.json").exists():
            raise ConfigError(
                f"model.source = {source!r}: its image processor cannot be read: {_first_line(error)}"
            ) from None
        return None
    try:
        with quiet_libraries():  # transformers warns that torchvision is not installed
            return AutoImageProcessor.from_pretrained(**files, **with_pillow(), trust_remote_code=False)
    except Exception as error:  # the error's class depends on the content of the file
        raise ConfigError(
            f"model.source = {source!r}: transformers cannot load its image processor with NumPy and Pillow "
            f"alone: {_first_line(error)}"
        ) from None


def _plain(size: int) -> Any:
    # Pixels range from -1 to 1, as for the paper's ViT-S/16.
    from fedsmoothlora.modeling.versions import image_processor_class

    return image_processor_class("Bit")(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=Image.Resampling.BICUBIC,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def _with_size(table: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A processor's settings with the size of its pixels replaced."""
    square = {"height": size, "width": size}
    changed = {key: square for key in ("crop_size", "pad_size") if table.get(key)}
    return {**table, **changed, "size": dict.fromkeys(table.get("size") or square, size)}


def _output_size(processor: Any) -> tuple[int, int] | None:
    """Height and width of a processor's output; None if they depend on the image.

    Raises ``ValueError`` if the output is not pixels of three channels alone.
    """
    found = set()
    for edge in (97, 160):
        inputs = processor([_noise(edge, edge)])
        if more := [name for name in inputs if name != "pixel_values"]:
            raise ValueError(f"it also returns {', '.join(more)}, which would not reach the model")
        shape = np.shape(inputs["pixel_values"][0])
        if len(shape) != 3 or shape[0] != 3:
            raise ValueError(f"it returns an array of shape {shape}; should be (3, height, width)")
        found.add((shape[1], shape[2]))
    return found.pop() if len(found) == 1 else None


def _noise(height: int, width: int) -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
