"""Updates as named tensors, and tensors as the bytes of a safetensors file with their SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from safetensors.torch import save as save_tensors
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.methods import Update


def flatten(update: Update) -> dict[str, Tensor]:
    """Name the tensors of an update: factors ``LAYER/B`` and ``LAYER/A``, plain tensors as they are."""
    tensors: dict[str, Tensor] = {}
    for name, value in update.items():
        if isinstance(value, LowRank):
            tensors[f"{name}/B"], tensors[f"{name}/A"] = value.B, value.A
        else:
            tensors[name] = value
    return tensors


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, LowRank | Tensor]:
    """The inverse of `flatten`. Raises ``KeyError`` for a factor ``B`` without its ``A``."""
    update: dict[str, LowRank | Tensor] = {}
    for key, tensor in tensors.items():
        if key.endswith("/B"):
            name = key.removesuffix("/B")
            update[name] = LowRank(tensor, tensors[f"{name}/A"])
        elif not key.endswith("/A"):
            update[key] = tensor
    return update


def products_in(update: Mapping[str, LowRank | Tensor]) -> dict[str, LowRank]:
    """The low-rank products of an update, without its plain tensors."""
    return {name: value for name, value in update.items() if isinstance(value, LowRank)}


def serialised(tensors: Mapping[str, Tensor]) -> tuple[bytes, str]:
    """Tensors as the bytes of a safetensors file, and their SHA-256."""
    data = save_tensors(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    )
    return data, hashlib.sha256(data).hexdigest()
