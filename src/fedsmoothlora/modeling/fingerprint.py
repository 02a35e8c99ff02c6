"""The fingerprint of a model's base weights: one hash, whatever wraps the model and whoever asks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fedsmoothlora.modeling.loading import model_files
from fedsmoothlora.modeling.settings import ModelSettings


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


# What decides how text becomes numbers, as transformers saves it.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)


NO_TOKENIZER = "none"


def tokenizer_hash(settings: ModelSettings) -> str:
    """SHA-256 of the names and contents of the model's tokenizer files; `NO_TOKENIZER` where it has none."""
    from transformers.utils import cached_file

    digest, found = hashlib.sha256(), False
    files = model_files(settings)
    source = files.pop("pretrained_model_name_or_path")
    for name in _TOKENIZER_FILES:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **files)
        if path is not None:
            data = Path(path).read_bytes()
            digest.update(f"{name}:{len(data)}:".encode() + data)
            found = True
    return digest.hexdigest() if found else NO_TOKENIZER
