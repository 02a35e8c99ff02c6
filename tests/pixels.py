"""Image processors for tests."""

from __future__ import annotations

from collections.abc import Sequence

from fedsmoothlora.modeling.image_processors import ImageProcessor
from fedsmoothlora.modeling.versions import image_processor_class


def processor(
    size: int, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3
) -> ImageProcessor:
    """Resizes the shorter side to ``size``, bicubic, crops the centre, and normalises."""
    own = image_processor_class("Bit")(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        resample=3,
        image_mean=list(mean),
        image_std=list(std),
    )
    return ImageProcessor(own, (size, size))
