"""Names and weights that are the same under all releases of transformers: those of a checkpoint."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import tiny
from torch import nn

from fedsmoothlora.modeling.fingerprint import saved_sha256
from fedsmoothlora.modeling.roles import linear_layers
from fedsmoothlora.modeling.versions import saved_names, saved_weights

FAMILIES = [
    ("Bert", "ForSequenceClassification"),
    ("GPT2", "ForCausalLM"),
    ("Llama", "ForCausalLM"),
    ("ViT", "ForImageClassification"),
    ("Dinov2", "ForImageClassification"),
]


@pytest.mark.parametrize(("family", "what"), FAMILIES, ids=[family for family, _ in FAMILIES])
def test_saved_names_are_those_of_the_file(family: str, what: str, tmp_path: Path) -> None:
    model = tiny(family, what)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    file, found = load_file(tmp_path / "model.safetensors"), saved_weights(model)
    assert file.keys() <= found.keys()  # a file holds tied weights once
    assert all(torch.equal(found[name], value) for name, value in file.items())
    names = saved_names(model, linear_layers(model))
    assert len(set(names.values())) == len(names)
    for layer, name in names.items():
        if f"{name}.weight" in file:
            assert torch.equal(file[f"{name}.weight"], model.get_submodule(layer).weight), layer
    assert sum(f"{name}.weight" in file for name in names.values()) >= len(names) - 1


def test_the_hash_by_saved_names_sees_weights_and_what_is_left_out() -> None:
    model = copy.deepcopy(tiny("Dinov2", "ForImageClassification"))
    whole, without = saved_sha256(model), saved_sha256(model, ["classifier"])
    assert whole != without
    with torch.no_grad():
        model.get_parameter("classifier.bias").add_(1)
    assert saved_sha256(model) != whole
    assert saved_sha256(model, ["classifier"]) == without


def test_a_model_that_is_not_of_transformers_has_its_own_names() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    assert saved_names(model, ["0"]) == {"0": "0"}
    assert saved_weights(model).keys() == {"0.weight", "0.bias"}
