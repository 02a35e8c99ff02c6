"""Roles of linear layers, such as the attention's projections, found on any model of transformers.

The same layer has other names in other models, and in other releases of transformers: the query of a ViT is
``query`` in 5.0 and ``q_proj`` in 5.23. A role in ``lora.target_modules`` is the same in all of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import get_args

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling.settings import ALL_LINEAR, LayerRole, LoraSettings

ROLES: tuple[str, ...] = get_args(LayerRole)

# Names of the layers that compute queries, keys and values, or several of them at once.
_QUERY = {"q", "query", "q_proj", "query_proj", "q_lin", "to_q", "wq", "q_attn", "q_a_proj", "q_b_proj"}
_KEY = {"k", "key", "k_proj", "key_proj", "k_lin", "to_k", "wk"}
_VALUE = {"v", "value", "v_proj", "value_proj", "v_lin", "to_v", "wv"}
_FUSED = {
    *{"qkv", "qkv_proj", "query_key_value", "c_attn", "wqkv", "to_qkv", "to_kv", "w_pack", "in_proj"},
    *{"kv", "kv_proj", "key_value", "kv_a_proj_with_mqa", "kv_b_proj"},
}
_QKV = _QUERY | _KEY | _VALUE | _FUSED
_IS_ATTENTION = re.compile(r"(attention|attn)\d*$", re.IGNORECASE)


def layers_of_role(role: str, model: nn.Module, linear: Collection[str], head: Sequence[str]) -> set[str]:
    """The linear layers of a role; the head, and a language model's output layer, have none.

    ``attention`` is every linear layer inside an attention module: a module whose class is named so, or
    which holds layers for queries, keys and values. ``attention-qkv`` is those of them that compute queries,
    keys or values. ``mlp`` is every other linear layer of the stacks of blocks that hold attention.

    Args:
        role: one of `ROLES`.
        model: the model (its parameters may be on the meta device).
        linear: names of the linear layers that LoRA can adapt.
        head: names of the head's modules.
    """
    logits = getattr(model, "get_output_embeddings", lambda: None)()
    body = {n for n in linear if not is_part(n, head) and model.get_submodule(n) is not logits}
    if role == ALL_LINEAR:
        return body
    attentions = {name for name, module in model.named_modules() if name and _is_attention(module)}
    attending = {name for name in body if _inside(name, attentions)}
    if role == "attention":
        return attending
    if role == "attention-qkv":
        return {name for name in attending if name.rpartition(".")[2].lower() in _QKV}
    blocks = set(_blocks(model, attentions))
    return {name for name in body - attending if _inside(name, blocks)}


def resolve_roles(model: nn.Module, settings: LoraSettings, head: Sequence[str]) -> LoraSettings:
    """The settings with the names of layers in place of roles, as a run records them.

    ``all-linear`` names no layer, and stays.

    Args:
        model: the model (its parameters may be on the meta device).
        settings: ``[lora]``.
        head: names of the head's modules.

    Raises:
        ConfigError: the model has no layer of a role; the message lists its linear layers.
    """
    linear = linear_layers(model)
    names: list[str] = []
    for entry in settings.target_modules:
        if entry == ALL_LINEAR or entry not in ROLES or named(entry, linear):
            names.append(entry)
            continue
        found = layers_of_role(entry, model, linear, head)
        if not found:
            raise ConfigError(f"lora.target_modules: {no_such_role(entry, model, linear)}")
        names += dict.fromkeys(_shortest(name, found, linear) for name in linear if name in found)
    return replace(settings, target_modules=tuple(dict.fromkeys(names)))


def named(entry: str, linear: Collection[str]) -> set[str]:
    """The layers with this name, or with this name as their last parts."""
    return {name for name in linear if f".{name}".endswith(f".{entry}")}


def no_such_role(role: str, model: nn.Module, linear: Collection[str]) -> str:
    """The message for a role of which the model has no layer."""
    meant = {"attention": "attention", "attention-qkv": "queries, keys and values", "mlp": "feed-forward"}
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
    return (
        f"{role!r} is a role of which {type(model).__name__} has no layer: it has no linear layers for "
        f"{meant[role]}, or they cannot be recognised; name layers instead. The linear layers are {kinds}"
    )


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers that LoRA can adapt, by name.

    A layer inside ``nn.MultiheadAttention`` is none of them: the attention reads its weight and never calls
    it, so LoRA would have no effect.
    """
    inside = {id(m) for a in model.modules() if isinstance(a, nn.MultiheadAttention) for m in a.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in inside
    }


def is_part(name: str, parts: Collection[str]) -> bool:
    """Whether a module is one of ``parts`` or inside one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _is_attention(module: nn.Module) -> bool:
    children = {name.lower() for name, _ in module.named_children()}
    return bool(_IS_ATTENTION.search(type(module).__name__)) or all(
        children & names for names in (_QUERY, _KEY, _VALUE)
    )


def _inside(name: str, containers: Collection[str]) -> bool:
    """Whether a module is inside one of the containers."""
    parts = name.split(".")
    return any(".".join(parts[:k]) in containers for k in range(1, len(parts)))


def _blocks(model: nn.Module, attentions: Collection[str]) -> Iterator[str]:
    """The items of stacks, such as the layers of an encoder; where stacks are nested, the inner ones' items.

    A stack is a list of modules with items that hold attention. Inside another stack it is one only if all
    of its items do: the list of attention and feed-forward inside a block of T5 is none.
    """
    stacks: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        items = [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        holding = [i for i in items if any(attention.startswith(f"{i}.") for attention in attentions)]
        nested = any(is_part(name, outer) for outer in stacks.values())
        if holding and (not nested or len(holding) == len(items)):
            classes = {type(model.get_submodule(item)) for item in holding}
            stacks[name] = [item for item in items if type(model.get_submodule(item)) in classes]
    for items in stacks.values():
        yield from (item for item in items if not any(is_part(inner, [item]) for inner in stacks))


def _shortest(name: str, wanted: Collection[str], linear: Collection[str]) -> str:
    """The fewest last parts of a layer's name that match no layer but the wanted ones."""
    parts = name.split(".")
    endings = (".".join(parts[-k:]) for k in range(1, len(parts)))
    return next((ending for ending in endings if named(ending, linear) <= set(wanted)), name)
