"""Merging into a pretrained model, against float64 arithmetic."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.exports.merged import merge
from fedsmoothlora.exports.trained import Trained
from fedsmoothlora.modeling.memmap import memmapped


class Tied(nn.Module):
    """Two layers that are one parameter, and a third that stores its weight transposed."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.turned = nn.Linear(3, 5), nn.Linear(3, 5), Conv1D(5, 3)
        self.second.weight = self.first.weight


def product(m: int, n: int) -> LowRank:
    draw = torch.Generator().manual_seed(0)
    B = torch.randn(m, 2, generator=draw, dtype=torch.float64)
    return LowRank(B, torch.randn(2, n, generator=draw, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["first", "turned"])
def test_a_merged_weight_is_the_float64_sum_rounded_once_in_its_own_layout(name, dtype):
    model = Tied().to(dtype)
    weight = model.get_submodule(name).weight
    delta = product(5, 3)
    total = (weight.double() if name == "first" else weight.double().mT) + delta.B @ delta.A
    want = (total if name == "first" else total.mT).to(dtype)
    merge(Trained(deltas={name: delta}), model)
    assert torch.equal(model.get_submodule(name).weight, want)
    assert model.get_submodule(name).weight.dtype == dtype


def test_a_tied_weight_stays_tied_and_can_be_trained_on():
    model = Tied()
    merge(Trained(deltas={"first": product(5, 3)}), model)
    assert model.second.weight is model.first.weight
    model.second(torch.ones(2, 3)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(model.second.weight, model.first.weight)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells what is anonymous")
def test_merged_weights_cost_no_anonymous_memory():
    size = 3000  # so large that the allocator gives back what a layer took
    mapped = memmapped({f"{k}": torch.zeros(size, size) for k in range(4)})
    model = nn.Sequential(*(nn.Linear(size, size, bias=False, device="meta") for _ in mapped))
    for layer, weight in zip(model, mapped.values(), strict=True):
        layer.weight = nn.Parameter(weight)
    ones = torch.ones(size, 1, dtype=torch.float64)
    before = anonymous_bytes()
    merge(Trained(deltas={f"{k}": LowRank(ones, ones.mT) for k in range(4)}), model)
    assert anonymous_bytes() - before < 20e6  # written in place, four weights are 144 MB
    assert all(bool((layer.weight == 1).all()) for layer in model)
