"""Tensors in memory-mapped files, which take no anonymous memory."""

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

# Alignment of tensors in the file, in bytes: as in memory, so that vectorised code takes the same paths.
_ALIGNMENT = 64


def memmapped(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to a memory-mapped file; return them contiguous and on the CPU.

    The system reads pages of the file when they are used and drops them when memory is short. The file is
    unlinked right away (where the system allows that), so it disappears with the last tensor. It is in the
    folder for temporary files; set ``TMPDIR`` to another folder if that one is held in memory. Writing to a
    tensor changes a private copy of the page, not the file. Tensors on the meta device are returned as they
    are.

    Raises ``StorageError``, with a remedy, if the file cannot be written.
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
                    # One tensor at a time, so that memory never holds a copy of all.
                    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
                    file.write(flat.numpy().data)
                    file.write(bytes(reserved - size))
        except OSError as error:
            raise StorageError(
                f"{sum(room) / 1e6:.0f} MB of weights cannot be written to {folder}: {error.strerror}; "
                "set TMPDIR to another folder"
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
