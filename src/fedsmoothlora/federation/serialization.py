"""Updates as named tensors, and tensors as the bytes of a safetensors file with their SHA-256."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import get_args

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from fedsmoothlora.algebra.coding import Packed, PackedPart
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Coded

_PACKED_PARTS: tuple[PackedPart, ...] = get_args(PackedPart)


def flatten(update: Coded) -> dict[str, Tensor]:
    """An update as a tensor file holds it.

    Factors are ``LAYER/B`` and ``LAYER/A``, plain tensors have their names. Packed values are
    ``NAME/codes``, ``NAME/scales`` and ``NAME/form``: place of the part in the list of them, rows, columns,
    bits.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in update.items():
        if isinstance(value, LowRank):
            tensors[f"{name}/B"], tensors[f"{name}/A"] = value.B, value.A
        elif isinstance(value, Packed):
            form = [_PACKED_PARTS.index(value.part), *value.shape, value.bits]
            tensors[f"{name}/codes"], tensors[f"{name}/scales"] = value.codes, value.scales
            tensors[f"{name}/form"] = torch.tensor(form, dtype=torch.int32)
        else:
            tensors[name] = value
    return tensors


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, LowRank | Tensor]:
    """The inverse of `flatten` for an update without packed values."""
    update: dict[str, LowRank | Tensor] = {}
    for name, value in unflatten_coded(tensors).items():
        if isinstance(value, Packed):
            raise TypeError(f"{name} is packed")
        update[name] = value
    return update


def unflatten_coded(tensors: Mapping[str, Tensor]) -> dict[str, LowRank | Tensor | Packed]:
    """The inverse of `flatten`.

    Raises ``KeyError`` where a tensor is missing, ``ValueError`` where tensors do not fit together.
    """
    update: dict[str, LowRank | Tensor | Packed] = {}
    for key, tensor in tensors.items():
        name, _, last = key.rpartition("/")
        if last == "codes" and f"{name}/form" in tensors:
            update[name] = _packed(tensor, tensors[f"{name}/scales"], tensors[f"{name}/form"])
        elif last in ("scales", "form") and f"{name}/codes" in tensors:
            continue
        elif last == "B" and name:
            update[name] = LowRank(tensor, tensors[f"{name}/A"])
        elif last != "A" or not name:
            update[key] = tensor
    return update


def _packed(codes: Tensor, scales: Tensor, form: Tensor) -> Packed:
    """A packed value; its content is checked where it is decoded. Raises ``ValueError``."""
    if form.shape != (4,) or form.dtype != torch.int32:
        raise ValueError(
            f"the form of a packed tensor is 4 whole numbers; got {form.dtype} {tuple(form.shape)}"
        )
    part, rows, columns, bits = form.tolist()
    if not (0 <= part < len(_PACKED_PARTS) and min(rows, columns) >= 0 and 2 <= bits <= 8):
        raise ValueError(f"there is no packed tensor of the form {[part, rows, columns, bits]}")
    if scales.ndim != 1 or codes.ndim != 1:
        raise ValueError("codes and scales of a packed tensor have one dimension")
    return Packed(codes, scales, (rows, columns), bits, _PACKED_PARTS[part])


def products_in(update: Coded) -> dict[str, LowRank]:
    """The low-rank products of an update, without its plain tensors."""
    return {name: value for name, value in update.items() if isinstance(value, LowRank)}


def serialised(tensors: Mapping[str, Tensor]) -> tuple[bytes, str]:
    """Tensors as the bytes of a safetensors file, and their SHA-256."""
    data = save_tensors(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    )
    return data, hashlib.sha256(data).hexdigest()
