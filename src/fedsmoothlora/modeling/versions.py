"""Differences between the releases of transformers that the package supports, in one place.

Each is found by what the installed release has, never by its number. Names of layers differ too; for those,
`fedsmoothlora.modeling.roles` finds layers by their role.
"""

from __future__ import annotations

from typing import Any

import transformers


def image_processor_class(family: str) -> type[Any]:
    """The image processor of a family that needs NumPy and Pillow alone, such as that of ``Bit``.

    Newer releases call it ``BitImageProcessorPil``, where ``BitImageProcessor`` needs torchvision; in older
    ones ``BitImageProcessor`` is the one that needs none.
    """
    found = getattr(transformers, f"{family}ImageProcessorPil", None)
    return found if found is not None else getattr(transformers, f"{family}ImageProcessor")


def with_pillow() -> dict[str, Any]:
    """The argument of ``AutoImageProcessor.from_pretrained`` for processors of NumPy and Pillow alone."""
    newer = getattr(transformers, "BitImageProcessorPil", None) is not None
    return {"backend": "pil"} if newer else {"use_fast": False}
