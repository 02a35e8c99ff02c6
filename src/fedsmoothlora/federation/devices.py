"""Where the tensors of a federation lie: clients compute on the accelerator, the server on the CPU.

A client's method sees tensors of one device, the model's. The tensors that the client received, kept or drew
come from the CPU; `fedsmoothlora.federation.client.Learner` moves them when it builds the ``ClientView``.

The server computes on the CPU, with or without an accelerator. The replies of a round wait there in
memory-mapped files, checkpoints are read there, and messages are made there, so a resumed run computes where
the first one did. The global model, to which updates are merged, stays on the accelerator.

On a machine without an accelerator nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank

SERVER = torch.device("cpu")

Value = TypeVar("Value", LowRank, Tensor, LowRank | Tensor)


def placed(values: Mapping[str, Value], device: torch.device) -> dict[str, Value]:
    """The same products and tensors, by name, on ``device``; no copies of those that are there already."""
    return {name: value.to(device=device) for name, value in values.items()}
