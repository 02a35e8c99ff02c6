"""The hash of base weights does not depend on what wraps the model."""

import copy
import hashlib
import struct
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fedsmoothlora import Federation
from fedsmoothlora.config import read
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.modeling.fingerprint import recognises, weights_sha256
from fedsmoothlora.modeling.settings import LoraSettings
from fedsmoothlora.runs.planning import build, plan


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.classifier = nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.layer(x))


@pytest.fixture
def model() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small()


def test_the_hash_is_unchanged_since_the_first_exports() -> None:
    model = nn.Linear(2, 3)
    model.register_buffer("count", torch.tensor([5, 6]))
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).view(3, 2) / 8)
        model.bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
    text = (
        b"bias (3,)\n"
        + struct.pack("<3f", 1.0, -2.0, 0.5)
        + b"count (2,)\n"
        + struct.pack("<2q", 5, 6)
        + b"weight (3, 2)\n"
        + struct.pack("<6f", 0, 0.125, 0.25, 0.375, 0.5, 0.625)
    )
    recorded = hashlib.sha256(text).hexdigest()
    assert recorded == "4b67e19a9af799260452a2b0053b347318e94dcb7d89e9b8ea0b015b34ae1744"
    assert weights_sha256(model) == recorded
    assert recognises(recorded, model)


def test_another_model_is_not_recognised(model: Small) -> None:
    recorded = weights_sha256(model)
    for value in model.state_dict().values():
        before = value.clone()
        value.view(-1)[-1] += 1
        assert not recognises(recorded, model)
        value.copy_(before)
    assert recognises(recorded, model)


def test_any_model_is_recognised_if_no_hash_was_recorded(model: Small) -> None:
    assert recognises(None, model)


def test_lora_and_wrappers_do_not_change_the_hash(model: Small) -> None:
    plain = weights_sha256(model)
    without_head = weights_sha256(model, ["classifier"])
    config = LoraConfig(r=2, target_modules=["layer"], modules_to_save=["classifier"])
    wrapped = get_peft_model(copy.deepcopy(model), config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:  # LoRA, and the copy of the head that PEFT trains
            nn.init.ones_(parameter)
    adapted = AdaptedModel(
        copy.deepcopy(model), LoraSettings(r=2, target_modules=("layer",)), head=["classifier"], ranks=[1]
    )
    for found in (wrapped, wrapped.get_base_model(), adapted.model):
        assert weights_sha256(found) == plain
        assert weights_sha256(found, ["classifier"]) == without_head
    with torch.no_grad():
        adapted.modules["layer"].get_parameter("weight")[0, 0] += 1
    assert weights_sha256(adapted.model) != plain


def test_the_layout_in_memory_does_not_change_the_hash(model: Small) -> None:
    plain = weights_sha256(model)
    model.layer.weight.data = model.layer.weight.data.mT.contiguous().mT
    assert not model.layer.weight.is_contiguous()
    assert weights_sha256(model) == plain


def test_bfloat16_values_are_hashed_as_float32(model: Small) -> None:
    rounded = copy.deepcopy(model).bfloat16()
    assert weights_sha256(rounded) == weights_sha256(copy.deepcopy(rounded).float())
    assert weights_sha256(rounded) != weights_sha256(model)


def test_persistent_buffers_are_hashed(model: Small) -> None:
    plain = weights_sha256(model)
    model.scratch += 1
    assert weights_sha256(model) == plain
    model.steps += 1
    assert weights_sha256(model) != plain


def test_tied_weights_are_hashed_under_each_name(model: Small) -> None:
    tied, copied = nn.ModuleDict({"a": model.layer}), nn.ModuleDict({"a": model.layer})
    tied["b"], copied["b"] = model.layer, copy.deepcopy(model.layer)
    assert weights_sha256(tied) == weights_sha256(copied) != weights_sha256(nn.ModuleDict({"a": model.layer}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: bnb.nn.Linear4bit(64, 64, quant_type="nf4"),
        lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    ],
    ids=["nf4", "int8"],
)
def test_quantised_weights_have_their_own_hash_which_use_does_not_change(
    make: Callable[[], nn.Module],
) -> None:
    plain = nn.Linear(64, 64)
    model = make()
    model.load_state_dict(plain.state_dict())
    model = model.to("cpu")
    found = weights_sha256(model)
    assert found != weights_sha256(plain)
    model.train()(torch.ones(2, 64))
    assert weights_sha256(model) == found


def test_every_path_to_a_model_gives_its_hash(model: Small, tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(8, 4), torch.arange(8) % 3)
    own = Federation(
        model,
        [data],
        head=["classifier"],
        method="fedit",
        test=data,
        lora={"r": 1, "target_modules": ["layer"]},
        training={"rounds": 1, "steps": 1},
        machine={"threads": 1, "device": "cpu"},
    )
    own.run(tmp_path / "run")
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text(encoding="utf-8"))
    facts = (own.save_adapter(tmp_path / "adapter") / "fedsmoothlora.json").read_text(encoding="utf-8")
    assert config["model"] == weights_sha256(model)
    assert weights_sha256(model, ["classifier"]) in facts


def test_a_model_that_a_federation_has_not_trained_yet_has_the_hash_of_its_checkpoint(
    toy_table: dict[str, Any],
) -> None:
    planned = plan(read(toy_table))
    found = weights_sha256(build(planned).learner.model.model)  # as a site of Flower computes it
    assert found == weights_sha256(planned.task_data.load().model)
