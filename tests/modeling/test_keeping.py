"""The place of the pretrained copies of rewritten weights."""

import functools
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fake_device import FAKE, FakeDevice
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.methods import Layer
from fedsmoothlora.modeling import keeping
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.modeling.backbone import MergedBackbone
from fedsmoothlora.modeling.keeping import kept, place_for
from fedsmoothlora.modeling.settings import KeepWeights, LoraSettings
from fedsmoothlora.runs.planning import plan

Table = dict[str, Any]
PLACES: tuple[KeepWeights, ...] = ("auto", "device", "host", "disk")


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    conv = Conv1D(6, 10)
    nn.init.normal_(conv.weight)
    return {"linear": nn.Linear(12, 8), "conv": conv}


def rewritten(keep: KeepWeights) -> list[bytes]:
    """The weights after a merge and a shift, and the pretrained ones, as bytes."""
    found = modules()
    layers = {
        name: Layer(name=name, m=m, n=n, rank=2, scale=2.0, gradient_rank=6)
        for name, (m, n) in {"linear": (8, 12), "conv": (6, 10)}.items()
    }
    backbone = MergedBackbone(found, layers, keep)
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        backbone.merge({name: LowRank(draw(one.m, 2), draw(2, one.n)) for name, one in layers.items()})
        backbone.set_shift({name: LowRank(draw(one.m, 2), draw(2, one.n)) for name, one in layers.items()})
    values = [module.get_parameter("weight").detach() for module in found.values()]
    values += [backbone.pretrained(name) for name in layers]
    return [value.contiguous().numpy().tobytes() for value in values]


@pytest.mark.parametrize("keep", PLACES)
def test_the_place_changes_no_bit(keep: KeepWeights) -> None:
    assert rewritten(keep) == rewritten("disk")


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_copies_on_an_accelerator_and_on_the_host(place: keeping.Place) -> None:
    value = torch.arange(12.0).view(3, 4)
    with FakeDevice():
        found = kept({"w": value.to(FAKE).mT}, place)["w"]
        assert found.device == (FAKE if place == "device" else torch.device("cpu"))
        assert found.is_contiguous()
        assert found.tolist() == value.mT.tolist()


@pytest.mark.parametrize(
    ("free_there", "free_here", "place"),
    [(3000, 0, "device"), (2999, 3000, "host"), (2999, 2999, "disk"), (0, 0, "disk")],
)
def test_auto_takes_the_first_place_with_three_times_the_room(
    monkeypatch: pytest.MonkeyPatch, free_there: int, free_here: int, place: str
) -> None:
    monkeypatch.setattr(keeping, "_free_on", lambda device: free_there)
    monkeypatch.setattr(keeping, "_free_on_host", lambda: free_here)
    with FakeDevice():
        weights = [torch.zeros(150).to(FAKE), torch.zeros(100).to(FAKE)]  # 1000 bytes
        assert place_for("auto", weights) == place
    assert place_for("auto", [torch.zeros(250)]) == "disk"  # on the CPU
    assert place_for("host", weights) == "host"


def test_free_memory_of_the_host_is_read_or_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keeping._free_on_host() > 0
    monkeypatch.delattr(keeping.os, "sysconf")
    assert keeping._free_on_host() == 0


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"machine.keep_weights": "device", "machine.device": "cpu"}, "needs an accelerator"),
        (
            {"machine.keep_weights": "host", "model.dtype": "bfloat16"},
            "'bfloat16' never changes",
        ),
        ({"machine.keep_weights": "host", "lora.target_modules": []}, "lora.target_modules is empty"),
    ],
    ids=["no accelerator", "no rewriting", "no layers"],
)
def test_a_place_without_effect_is_refused(toy_table: Table, overrides: Table, words: str) -> None:
    with pytest.raises(ConfigError, match=f"machine.keep_weights = .*{words}"):
        read(toy_table, overrides)


def test_a_device_that_turns_out_to_be_the_cpu_is_refused(toy_table: Table) -> None:
    toy_table["machine"] = {"device": "auto", "keep_weights": "device"}
    with pytest.raises(ConfigError, match=r"machine.device = 'auto' is the CPU here; use 'host' or 'disk'"):
        plan(read(toy_table))


def test_a_model_in_bfloat16_has_no_copies_to_place() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    with pytest.raises(ConfigError, match="never changed nor copied"):
        AdaptedModel(model, LoraSettings(r=2, target_modules=("0",)), keep_weights="host")
