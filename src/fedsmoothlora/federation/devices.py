"""The devices of a federation's tensors: clients compute on the accelerator, the server on the CPU.

A client's method receives all tensors on the model's device. Tensors that the client received, kept or drew
are on the CPU; `fedsmoothlora.federation.client.Learner` moves them when it builds the ``ClientView``.

The server always computes on the CPU. Replies (in memory-mapped files), checkpoints and messages are on the
CPU too, so a resumed run computes on the same device. The global model, into which updates are merged, stays
on the accelerator.

On a machine without an accelerator nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.settings import MachineSettings
from fedsmoothlora.training.arithmetic import arithmetic, prepare
from fedsmoothlora.training.devices import resolved

SERVER = torch.device("cpu")

Value = TypeVar("Value", LowRank, Tensor, LowRank | Tensor)


def placed(values: Mapping[str, Value], device: torch.device) -> dict[str, Value]:
    """Move products or tensors to ``device``; those that are on it are not copied."""
    return {name: value.to(device=device) for name, value in values.items()}


def check_device(machine: MachineSettings) -> None:
    """Check ``[machine]`` on this machine, before it computes anything.

    Raises ``ConfigError`` if it cannot carry out ``machine.device``, ``keep_weights`` or ``deterministic``.
    """
    device = resolved(machine.device)
    if device.type == "cpu" and machine.keep_weights == "device":
        raise ConfigError(
            f"machine.keep_weights = 'device': machine.device = {machine.device!r} is the CPU here; use "
            "'host' or 'disk'"
        )
    prepare(device, deterministic=machine.deterministic)


def device_notes(machine: MachineSettings) -> list[str]:
    """A note for every key of ``[machine]`` without effect on the device that this machine has."""
    device = resolved(machine.device)
    if device.type == "cuda":
        return []
    keys = {"deterministic": machine.deterministic or None, "tf32": machine.tf32}
    return [
        f"machine.{key} = {str(value).lower()} has no effect here: it is for NVIDIA GPUs, and clients train "
        f"on {device.type!r}"
        for key, value in keys.items()
        if value is not None
    ]


def computing(machine: MachineSettings) -> AbstractContextManager[None]:
    """The context in which a run computes: ``machine.deterministic`` and ``machine.tf32``.

    Raises ``ConfigError`` as `fedsmoothlora.training.arithmetic.arithmetic` does.
    """
    return arithmetic(resolved(machine.device), deterministic=machine.deterministic, tf32=machine.tf32)
