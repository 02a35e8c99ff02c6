"""Merge a trained model into the weights of the pretrained one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.exports.trained import Trained
from fedsmoothlora.modeling.backbone import shape_of
from fedsmoothlora.modeling.memmap import memmapped
from fedsmoothlora.modeling.unmerged import dequantised


@torch.no_grad()
def merge(trained: Trained, model: nn.Module) -> None:
    """Write a trained model's weights and head into a copy of the pretrained model.

    ``W = W^0 + delta``, computed in float64 and rounded once. A layer with quantised weights is replaced by
    one in the dtype of the model's other weights, because quantising again would lose the delta. On the CPU,
    changed weights are in a memory-mapped file. Written in place, they would be a second copy in memory,
    since the pretrained weights are memory-mapped too.

    Raises ``StorageError`` if there is no room for that file.
    """
    for name, delta in trained.deltas.items():
        module = model.get_submodule(name)
        if not module.get_parameter("weight").is_floating_point():
            module = _unquantised(module, model)
            model.set_submodule(name, module)
        merge_layer(module, delta)
    for name, value in trained.head.items():
        model.get_parameter(name).copy_(value)


@torch.no_grad()
def merge_layer(module: nn.Module, delta: LowRank | Tensor) -> None:
    """Add a delta ``(m, n)`` to the weight of a linear layer; ``Conv1D`` stores it transposed."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    dense = delta.dense() if isinstance(delta, LowRank) else delta
    total = (weight if isinstance(module, nn.Linear) else weight.mT).to("cpu", torch.float64) + dense
    stored = (total if isinstance(module, nn.Linear) else total.mT).to(weight.dtype)
    if weight.device.type == "cpu":
        weight.data = memmapped({"weight": stored})["weight"]
    else:
        weight.copy_(stored)


def _unquantised(module: nn.Module, model: nn.Module) -> nn.Linear:
    """A linear layer with the dequantised weights of a quantised one."""
    m, n = shape_of(module)
    dtype = next((value.dtype for value in model.parameters() if value.is_floating_point()), torch.float32)
    bias, device = module.bias, module.get_parameter("weight").device
    plain = nn.Linear(n, m, bias=bias is not None, device=device, dtype=dtype)
    plain.weight.copy_(dequantised(module))
    if isinstance(bias, Tensor):
        plain.bias.copy_(bias)
    return plain
