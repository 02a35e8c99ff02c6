"""Tensors that stand in a file and are mapped into memory, so that they cost no anonymous memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedsmoothlora.algebra.coding import Packed
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.errors import StorageError

# Where tensors begin in the file, in bytes: as in memory, so that vectorised code takes the same paths.
_ALIGNMENT = 64


def memmapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous and on the CPU, in a file of their own that is mapped into memory.

    Their pages belong to the file: the system reads them when they are touched and drops them when memory is
    wanted. The file has no name after this (where the system allows that) and is gone with the last
    tensor. It stands where temporary files do; ``TMPDIR`` names another folder if that is held in memory.
    Whoever writes to a tensor changes a copy of the page. Tensors on the meta device have no values and stay.

    Raises ``StorageError``, with what can be done, if the file cannot be written.
    """
    sizes = [tensor.nbytes for tensor in tensors.values()]
    room = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    if not sum(room) or any(tensor.is_meta for tensor in tensors.values()):  # nothing to hold
        return {name: tensor if tensor.is_meta else tensor.cpu() for name, tensor in tensors.items()}
    with tempfile.TemporaryDirectory(prefix="fedsmoothlora-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "tensors"
        try:
            with path.open("wb") as file:
                for tensor, size, reserved in zip(tensors.values(), sizes, room, strict=True):
                    # One at a time: there is no copy of all in memory.
                    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                    file.write(flat.numpy().data)
                    file.write(bytes(reserved - size))
        except OSError as error:
            raise StorageError(
                f"{sum(room) / 1e6:.0f} MB of weights do not go into {folder}: {error.strerror}; "
                "TMPDIR names another folder for them"
            ) from None
        whole = torch.from_file(str(path), shared=False, size=sum(room), dtype=torch.uint8)
    return {
        name: part[:size].view(tensor.dtype).view(tensor.shape)
        for (name, tensor), part, size in zip(tensors.items(), whole.split(room), sizes, strict=True)
    }


def memmapped_update(update: Coded) -> Coded:
    """The same update with its tensors in a file."""
    tensors: dict[str, Tensor] = {}
    for name, value in update.items():
        tensors |= {f"{name}/{part}": tensor for part, tensor in _tensors(value).items()}
    mapped = memmapped(tensors)

    def again(name: str, value: LowRank | Tensor | Packed) -> LowRank | Tensor | Packed:
        if isinstance(value, LowRank):
            return LowRank(mapped[f"{name}/B"], mapped[f"{name}/A"])
        if isinstance(value, Packed):
            return replace(value, codes=mapped[f"{name}/codes"], scales=mapped[f"{name}/scales"])
        return mapped[f"{name}/"]

    return {name: again(name, value) for name, value in update.items()}


def _tensors(value: LowRank | Tensor | Packed) -> dict[str, Tensor]:
    if isinstance(value, LowRank):
        return {"B": value.B, "A": value.A}
    if isinstance(value, Packed):
        return {"codes": value.codes, "scales": value.scales}
    return {"": value}
