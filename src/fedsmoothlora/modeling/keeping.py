"""The place of the pretrained copies of rewritten weights: on the device, in host memory or on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from fedsmoothlora.modeling.memmap import memmapped
from fedsmoothlora.modeling.settings import KeepWeights

Place = Literal["device", "host", "disk"]

# `auto` leaves two thirds of the free memory to activations, gradients and the optimiser.
_SHARE_OF_FREE = 1 / 3


def place_for(wanted: KeepWeights, weights: Iterable[Tensor]) -> Place:
    """The place that ``machine.keep_weights`` means for these weights.

    ``auto`` is the disk for weights on the CPU, since the system keeps the file's pages in memory while there
    is room. For weights on an accelerator it is the first of device and host whose free memory is at least
    three times their size, otherwise the disk.
    """
    if wanted != "auto":
        return wanted
    tensors = list(weights)
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type in ("cpu", "meta"):
        return "disk"
    size = sum(tensor.nbytes for tensor in tensors)
    if size <= _free_on(device) * _SHARE_OF_FREE:
        return "device"
    return "host" if size <= _free_on_host() * _SHARE_OF_FREE else "disk"


def kept(weights: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
    """Contiguous copies of the weights, to be read only.

    Copies in host memory of weights on a GPU are page-locked (pinned), so that they reach the GPU without a
    further copy. Tensors on the meta device are returned as they are.

    Raises ``StorageError`` if the disk has no room.
    """
    if place == "disk" or any(tensor.is_meta for tensor in weights.values()):
        return memmapped(weights)
    if place == "device":
        return {name: _copy(tensor) for name, tensor in weights.items()}
    return {name: _on_host(tensor) for name, tensor in weights.items()}


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _on_host(tensor: Tensor) -> Tensor:
    copy = _copy(tensor) if tensor.device.type == "cpu" else tensor.detach().cpu().contiguous()
    return copy.pin_memory() if tensor.device.type == "cuda" else copy


def _free_on(device: torch.device) -> int:
    """Free memory of the device in bytes. Accelerators other than CUDA share the memory of the host."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_on_host()


def _free_on_host() -> int:
    """Free memory of the host in bytes; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
