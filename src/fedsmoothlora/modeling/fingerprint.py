"""The fingerprint of a model's base weights: the same hash whether or not PEFT wraps the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fedsmoothlora.modeling.loading import model_files
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.modeling.versions import saved_weights


def weights_sha256(model: nn.Module, without: Iterable[str] = ()) -> str:
    """SHA-256 of the names and values of a model's parameters and persistent buffers.

    The hash covers ``NAME (SIZE, ...)\\n`` and the bytes of the values, for every tensor of ``state_dict()``
    in the order of names. Tensors are moved to the CPU and converted one at a time.

    - Floating-point values are hashed as float32, little-endian, so a bfloat16 checkpoint has the same hash
      whatever dtype it is loaded in. Float64 values are rounded.
    - Other values are hashed as they are stored. These include the packed weights of bitsandbytes, whose
      scales are hashed too, so a quantised model and its original have different hashes.
    - Values are hashed row by row, whatever their layout in memory.
    - A tied tensor is hashed under each of its names.
    - Adapters of PEFT are not hashed: neither their parameters nor the names of the modules that wrap a
      layer.

    Exports and the ``config.toml`` of a `fedsmoothlora.Federation` record the hash, so it must never change.

    Args:
        model: the model, wrapped by PEFT or not.
        without: names of modules that are left out, such as a head that is replaced.
    """
    return _sha256(_base_weights(model), without)


def saved_sha256(model: nn.Module, without: Iterable[str] = ()) -> str:
    """SHA-256 of the names and floating-point values of a model's weights in a checkpoint.

    In contrast to `weights_sha256`, it does not depend on the names that a release of transformers gives to
    layers.

    Args:
        model: the model, without adapters.
        without: names of modules that are left out.
    """
    return _sha256(saved_weights(model), without)


def _sha256(weights: Mapping[str, Tensor], without: Iterable[str]) -> str:
    digest = hashlib.sha256()
    prefixes = tuple(f"{name}." for name in without)
    for name, value in sorted(weights.items()):
        if not name.startswith(prefixes):
            value = value.detach().cpu()
            value = value.float() if value.is_floating_point() else value
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def recognises(recorded: str | None, model: nn.Module, without: Iterable[str] = ()) -> bool:
    """Whether a recorded hash is the model's; true if none was recorded.

    Args:
        recorded: a result of `weights_sha256`, or None.
        model, without: as in `weights_sha256`.
    """
    return recorded is None or weights_sha256(model, without) == recorded


def _base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by the names that they had before PEFT wrapped the model."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # Inner wrappers come first, because their names begin with those of the outer ones.
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
    """The attribute of a PEFT wrapper that holds the pretrained module; None for all other modules."""
    if isinstance(module, BaseTunerLayer):
        return "base_layer"
    return "original_module" if isinstance(module, AuxiliaryTrainingWrapper) else None


# The files, as transformers saves them, that determine how a text is tokenised.
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
    """SHA-256 of the names and contents of the model's tokenizer files; `NO_TOKENIZER` if it has none."""
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
