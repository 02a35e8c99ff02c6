"""Weights with everything merged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsmoothlora.exports.trained import Trained
from fedsmoothlora.lowrank import LowRank
from fedsmoothlora.mapped import on_disk


@torch.no_grad()
def merge(trained: Trained, model: nn.Module) -> None:
    """Write a trained model's weights and head into a copy of the pretrained model.

    ``W = W^0 + change``, computed in float64 and rounded once. On the CPU a changed weight stands in a mapped
    file: written into the model, which is mapped itself, it would be a second copy of it in memory.

    Raises ``OSError`` if there is no room for that file.
    """
    for name, change in trained.changes.items():
        merge_layer(model.get_submodule(name), change)
    for name, value in trained.head.items():
        model.get_parameter(name).copy_(value)


@torch.no_grad()
def merge_layer(module: nn.Module, change: LowRank | Tensor) -> None:
    """Add a change ``(m, n)`` to the weight of a linear layer; ``Conv1D`` stores it transposed."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    dense = change.dense() if isinstance(change, LowRank) else change
    total = (weight if isinstance(module, nn.Linear) else weight.mT).to("cpu", torch.float64) + dense
    stored = (total if isinstance(module, nn.Linear) else total.mT).to(weight.dtype)
    if weight.device.type == "cpu":
        weight.data = on_disk({"weight": stored})["weight"]
    else:
        weight.copy_(stored)
