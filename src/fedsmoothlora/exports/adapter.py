"""A trained model as one standard PEFT LoRA on the untouched pretrained model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedsmoothlora.errors import NotKeptError
from fedsmoothlora.exports.base import Base, is_in, task_of, whole_modules
from fedsmoothlora.exports.merged import merge_layer
from fedsmoothlora.exports.trained import Compressed, Trained, compress
from fedsmoothlora.modeling.versions import KEYS_OF_LORA, saved_names
from fedsmoothlora.storage.files import write_text

_PEFT_TASKS = {
    "text-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "text-generation": "CAUSAL_LM",
    "text2text-generation": "SEQ_2_SEQ_LM",
}

# PEFT's value for no LoRA layers, for an adapter that only replaces modules.
_NO_LAYERS = "dummy-target-modules"


@dataclass(frozen=True, kw_only=True)
class AdapterFacts:
    """The content of a written adapter.

    Attributes:
        layers: the product of each layer with LoRA, and its error.
        whole: names of the modules that the adapter replaces whole.
        saved_names: the name of each layer in a checkpoint, which all releases of transformers know.
    """

    layers: Mapping[str, Compressed]
    whole: tuple[str, ...]
    saved_names: Mapping[str, str]

    @property
    def rank(self) -> int:
        """The highest rank in the adapter."""
        return max((layer.product.rank for layer in self.layers.values()), default=0)

    @property
    def exact_rank(self) -> int:
        """The rank of an exact adapter."""
        return max((layer.exact_rank for layer in self.layers.values()), default=0)


def save_adapter(
    trained: Trained,
    base: Base,
    folder: Path,
    *,
    rank: int | None = None,
    revision: str | None = None,
) -> AdapterFacts:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``.

    The factors contain the scale, and PEFT's own scale is 1 everywhere (``lora_alpha = r``, also where
    ``rank_pattern`` and ``alpha_pattern`` give a layer another rank). So rsLoRA makes no difference, and
    servers that only read ``r`` and ``lora_alpha`` also scale correctly.

    A head that was trained whole, or that the checkpoint lacks, is saved whole (PEFT's ``modules_to_save``),
    with its LoRA merged if it had one. So is the head of every classifier of texts or tokens, because PEFT
    requires it.

    Args:
        trained: the trained model.
        base: its pretrained model, which is modified.
        folder: an existing folder.
        rank: the highest rank of a layer; exact unless given.
        revision: the revision of a base model from the hub.

    Raises:
        NotKeptError: PEFT cannot represent it, because an adapted layer shares its weight with another module
            or a parameter that was drawn at random belongs to no module.
    """
    model = base.model
    _check(base, trained)
    whole = whole_modules(base, trained.head)
    inside = {name for name in trained.deltas if is_in(name, whole)}
    with torch.no_grad():
        for name in inside:
            merge_layer(model.get_submodule(name), trained.deltas[name])
        for name, value in trained.head.items():
            model.get_parameter(name).copy_(value)
    layers = {name: compress(delta, rank) for name, delta in trained.deltas.items() if name not in inside}
    layers = {name: layer for name, layer in layers.items() if layer.product.rank}
    task, names = task_of(model), saved_names(model, layers)
    with torch.random.fork_rng():  # PEFT draws initial factors, which are overwritten
        peft_model = get_peft_model(model, _config(model, layers, whole, task, revision))
    _fill(peft_model, layers, whole)
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    _for_older_releases(folder / "adapter_config.json")
    return AdapterFacts(layers=layers, whole=whole, saved_names=names)


def _config(
    model: nn.Module,
    layers: Mapping[str, Compressed],
    whole: tuple[str, ...],
    task: str | None,
    revision: str | None,
) -> LoraConfig:
    rank = max((layer.product.rank for layer in layers.values()), default=1)
    ranks = {
        f"^{re.escape(name)}$": layer.product.rank
        for name, layer in layers.items()
        if layer.product.rank != rank
    }
    return LoraConfig(
        task_type=_PEFT_TASKS.get(task or ""),
        r=rank,
        lora_alpha=rank,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules=_targets(model, layers),
        modules_to_save=list(whole) or None,
        fan_in_fan_out=bool(layers) and all(isinstance(model.get_submodule(n), Conv1D) for n in layers),
        revision=revision,
    )


def _targets(model: nn.Module, layers: Iterable[str]) -> list[str] | str:
    """``target_modules`` that match these layers and no others; short names if possible."""
    names = set(layers)
    if not names:
        return _NO_LAYERS
    kinds = sorted({name.rpartition(".")[2] for name in names})
    for entries in (kinds, sorted(names)):
        if names == {n for n, _ in model.named_modules() if any(f".{n}".endswith(f".{e}") for e in entries)}:
            return entries
    return f"^(?:{'|'.join(re.escape(name) for name in sorted(names))})$"


def _for_older_releases(path: Path) -> None:
    """Leave out of ``adapter_config.json`` the keys that PEFT 0.18 does not know; each has its default.

    Older releases of PEFT warn of keys that they do not know, and servers of adapters may refuse them.

    Raises ``RuntimeError`` if such a key has another value than its default, which `_config` never sets.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    newer = table.keys() - KEYS_OF_LORA
    defaults = {field.name: field.default for field in fields(LoraConfig)}
    if changed := sorted(key for key in newer if table[key] and table[key] != defaults.get(key)):
        raise RuntimeError(
            f"{path.name} has values of {', '.join(changed)}, which older releases would ignore"
        )
    kept = {key: value for key, value in table.items() if key not in newer}
    write_text(path, json.dumps(kept, indent=2, sort_keys=True))


@torch.no_grad()
def _fill(peft_model: PeftModel, layers: Mapping[str, Compressed], whole: tuple[str, ...]) -> None:
    """Copy the factors into PEFT's layers. Raises ``RuntimeError`` if PEFT adapted other layers or ranks."""
    made: dict[str, Any] = {
        name: module
        for name, module in peft_model.get_base_model().named_modules()
        if isinstance(module, LoraLayer | AuxiliaryTrainingWrapper)
    }
    if made.keys() != {*layers, *whole}:
        raise RuntimeError(f"PEFT adapted {sorted(made)}, where {sorted({*layers, *whole})} was asked for")
    for name, layer in layers.items():
        A, B = made[name].lora_A["default"].weight, made[name].lora_B["default"].weight
        if A.shape != layer.product.A.shape or made[name].scaling["default"] != 1.0:
            raise RuntimeError(f"PEFT gave layer {name} rank {len(A)}; {layer.product.rank} was asked for")
        A.copy_(layer.product.A)
        B.copy_(layer.product.B)


def _check(base: Base, trained: Trained) -> None:
    """Raise ``NotKeptError`` for a model that PEFT cannot represent."""
    for name in base.drawn:
        if "." not in name:
            raise NotKeptError(
                f"parameter {name} was drawn at random and belongs to no module that PEFT could save: "
                "export it merged"
            )
    names: dict[int, list[str]] = {}
    for name, value in base.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    for name in trained.head:
        others = [n for n in names[id(base.model.get_parameter(name))] if n not in trained.head]
        if others:
            raise NotKeptError(
                f"{name} of the head is shared with {', '.join(others)}, which changed with it: PEFT saves "
                "the head alone; export it merged"
            )
    for layer in trained.deltas:
        weight = base.model.get_submodule(layer).weight
        others = [name for name in names[id(weight)] if name != f"{layer}.weight"]
        if others:
            raise NotKeptError(
                f"layer {layer} shares its weight with {', '.join(others)}, which changed with it: a LoRA on "
                "the layer alone would be another model; export it merged"
            )
