"""The fingerprint of a model's base weights: one hash, whatever wraps the model and whoever asks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn


def weights_sha256(model: nn.Module, without: Iterable[str] = ()) -> str:
    """SHA-256 of the names and values of a model's parameters and persistent buffers.

    The hash is of ``NAME (SIZE, ...)\\n`` and the values' bytes, for every tensor of ``state_dict()`` in the
    order of names. One tensor at a time is brought to the CPU and converted.

    - Floating-point values count as float32, little-endian: a checkpoint in bfloat16 has one hash, whatever
      dtype it is loaded in. Float64 values are rounded.
    - Other values count as they are stored. These include the packed weights of bitsandbytes, whose scales
      count beside them, so a quantised model and the one that it was made of have different hashes.
    - Values count row by row, however they are laid out in memory.
    - A tensor that is tied to another counts under each of its names.
    - Adapters of PEFT do not count: neither their parameters, nor the names of what wraps a layer.

    Exports and the ``config.toml`` of a `fedsmoothlora.Federation` record the hash, so it must never change.

    Args:
        model: the model, wrapped by PEFT or not.
        without: names of modules that are left out, because they are replaced anyway.
    """
    digest = hashlib.sha256()
    prefixes = tuple(f"{name}." for name in without)
    for name, value in sorted(_base_weights(model).items()):
        if not name.startswith(prefixes):
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def recognises(recorded: str | None, model: nn.Module, without: Iterable[str] = ()) -> bool:
    """Whether a recorded hash is that of the model.

    Args:
        recorded: as `weights_sha256` gave it; None where none was recorded, so that no model contradicts it.
        model, without: as in `weights_sha256`.
    """
    return recorded is None or weights_sha256(model, without) == recorded


def _base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names that they had before PEFT wrapped the model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # Inner wrappers first, whose names hold those of the outer ones.
    wrappers = [(name, _wrapped(module)) for name, module in base.named_modules() if _wrapped(module)][::-1]
    found = {}
    for name, value in base.state_dict().items():
        for wrapper, inner in wrappers:
            if name.startswith(f"{wrapper}."):
                kept = name.startswith(f"{wrapper}.{inner}.")
                name = name.replace(f"{wrapper}.{inner}.", f"{wrapper}.", 1) if kept else ""
        if name and isinstance(value, Tensor):
            found[name] = value
    return found


def _wrapped(module: nn.Module) -> str | None:
    """The name of the pretrained module in one of PEFT's; None for all other modules."""
    if isinstance(module, BaseTunerLayer):
        return "base_layer"
    return "original_module" if isinstance(module, AuxiliaryTrainingWrapper) else None
