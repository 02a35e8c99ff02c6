"""Roles of layers are the same layers in every architecture, whatever their names."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import DECODERS, ENCODERS, SEQ2SEQ, VISION, tiny
from torch import nn

from fedsmoothlora.config import read, recipes
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling.adapters import find_layers
from fedsmoothlora.modeling.roles import ROLES, linear_layers, resolve_roles
from fedsmoothlora.modeling.settings import LoraSettings

HEAD = ("classifier", "score", "classification_head")
# In two blocks: linear layers of attention, those for queries, keys and values, and the other ones.
COUNTS: dict[str, tuple[int, int, int]] = {
    **dict.fromkeys(("Bert", "Roberta", "DistilBert", "ViT", "Dinov2", "Swin", "CLIP", "OPT"), (8, 6, 4)),
    **dict.fromkeys(("Llama", "Qwen3", "Gemma"), (8, 6, 6)),
    **dict.fromkeys(("GPTNeoX", "Bloom", "GPT2"), (4, 2, 4)),
    **{"DebertaV2": (12, 6, 4), "T5": (24, 18, 8), "Bart": (24, 18, 8)},
}

MINIMAL: dict[str, Any] = {
    "name": "roles",
    "model": {"source": "pkg:dinov2-small"},
    "data": {"source": "pkg:mnist-5k"},
    "partition": {"kind": "iid", "clients": 2},
    "training": {"rounds": 1, "epochs": 1},
}
ATTENTION = LoraSettings(target_modules="attention")


def model_of(family: str) -> nn.Module:
    what = "ForImageClassification" if family in VISION else "ForSequenceClassification"
    assert family in {**ENCODERS, **DECODERS, **SEQ2SEQ, **VISION}
    return tiny(family, what)


def adapted(model: nn.Module, *targets: str, head: Any = HEAD) -> set[str]:
    settings = LoraSettings(r=1, target_modules=targets)
    return set(find_layers(model, settings, head, head_is_trained_whole=True))


@pytest.mark.parametrize("family", sorted(COUNTS))
def test_roles_are_the_same_layers_in_every_architecture(family: str) -> None:
    model = model_of(family)
    attention, qkv, mlp = (adapted(model, role) for role in ("attention", "attention-qkv", "mlp"))
    assert (len(attention), len(qkv), len(mlp)) == COUNTS[family]
    assert qkv <= attention
    assert not attention & mlp
    assert attention | mlp <= adapted(model, "all-linear")


@pytest.mark.parametrize("family", sorted(COUNTS))
@pytest.mark.parametrize("role", ["attention", "attention-qkv", "mlp"])
def test_resolved_names_are_the_same_layers_in_the_same_order(family: str, role: str) -> None:
    model, settings = model_of(family), LoraSettings(r=1, target_modules=(role,))
    resolved = resolve_roles(model, settings, HEAD)
    assert not set(resolved.target_modules) & set(ROLES)
    found = [list(find_layers(model, one, HEAD, head_is_trained_whole=True)) for one in (settings, resolved)]
    assert found[0] == found[1]
    assert resolve_roles(model, resolved, HEAD) == resolved


def test_a_role_alone_is_a_list_of_it() -> None:
    assert LoraSettings(target_modules="mlp") == LoraSettings(target_modules=("mlp",))
    assert read({**MINIMAL, "lora": {"target_modules": "mlp"}}).lora.target_modules == ("mlp",)
    for wrong in ("q_proj", "attention_qkv", "atention"):
        with pytest.raises(ConfigError, match=rf"target_modules = '{wrong}'"):
            read({**MINIMAL, "lora": {"target_modules": wrong}})


def test_roles_and_names_can_be_mixed() -> None:
    model = model_of("Bert")
    assert adapted(model, "attention-qkv", "intermediate.dense") == {
        name
        for name in linear_layers(model)
        if name.endswith(("query", "key", "value", "intermediate.dense"))
    }
    settings = LoraSettings(target_modules=("attention-qkv", "query", "all-linear"))
    assert resolve_roles(model, settings, HEAD).target_modules == ("query", "key", "value", "all-linear")


def test_a_model_without_the_layers_is_refused_with_its_linear_layers_listed() -> None:
    model = model_of("ConvNext")
    for resolve in (lambda: adapted(model, "attention"), lambda: resolve_roles(model, ATTENTION, HEAD)):
        with pytest.raises(ConfigError, match=r"'attention' is a role.*ConvNext.*classifier, pwconv1"):
            resolve()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), nn.Linear(4, 4)


def test_a_layer_that_has_the_name_of_a_role_is_meant_by_it() -> None:
    model = nn.Sequential(Block(), Block())
    assert adapted(model, "mlp", head=()) == {"0.mlp", "1.mlp"}
    assert resolve_roles(model, LoraSettings(target_modules="mlp"), ()).target_modules == ("mlp",)
    assert len(adapted(model, "attention", head=())) == 8


@given(blocks=st.lists(st.sampled_from(["attends", "does not"]), min_size=1, max_size=5))
def test_a_stack_may_mix_blocks(blocks: list[str]) -> None:
    """The feed-forward layers outside blocks with attention, and outside the stack, are not of the role."""

    def block(attends: bool) -> nn.Module:
        parts: dict[str, nn.Module] = {"up": nn.Linear(4, 8)}
        return nn.ModuleDict({**parts, "mixing": Attention()} if attends else parts)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(4, 4)
            self.layers = nn.ModuleList(block(kind == "attends") for kind in blocks)

    with torch.device("meta"):
        model = Stack()
    attending = blocks.count("attends")
    if not attending:
        with pytest.raises(ConfigError, match="is a role"):
            adapted(model, "mlp", head=())
        return
    assert adapted(model, "mlp", head=()) == {f"layers.{k}.up" for k in range(len(blocks))}
    assert len(adapted(model, "attention", head=())) == 4 * attending


def test_recipes_use_roles_where_their_published_layers_are_one() -> None:
    with_role = {
        name for name in recipes() if set(read(name).lora.target_modules) & {*ROLES} - {"all-linear"}
    }
    assert with_role >= {"quickstart", "cifar100-iid", "minilm-bbc", "ast-drums"}
    named = {entry for name in recipes() for entry in read(name).lora.target_modules} - {*ROLES}
    # GLUE's and FlowerTune's recipes adapt queries and values; their model names them alike in all releases.
    assert named == {"query", "value", "q_proj", "v_proj", "classifier"}
