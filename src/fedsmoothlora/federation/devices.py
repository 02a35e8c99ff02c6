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
from typing import TypeVar

import torch
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.settings import MachineSettings
from fedsmoothlora.training.devices import resolved

SERVER = torch.device("cpu")

Value = TypeVar("Value", LowRank, Tensor, LowRank | Tensor)


def placed(values: Mapping[str, Value], device: torch.device) -> dict[str, Value]:
    """Move products or tensors to ``device``; those that are on it are not copied."""
    return {name: value.to(device=device) for name, value in values.items()}


def check_device(machine: MachineSettings) -> None:
    """Raise ``ConfigError`` if this machine cannot carry out ``machine.device`` or ``keep_weights``."""
    if resolved(machine.device).type == "cpu" and machine.keep_weights == "device":
        raise ConfigError(
            f"machine.keep_weights = 'device': machine.device = {machine.device!r} is the CPU here; use "
            "'host' or 'disk'"
        )
