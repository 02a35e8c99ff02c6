"""Feature vectors of texts from a frozen model, computed once and cached."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.packages import cached
from fedsmoothlora.data.tokens import Documents, by_length
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling.padding import without_padding_effects
from fedsmoothlora.modeling.text import TextModel

# ``head``: the input of the model's head; ``mean``: the mean of the last layer over the tokens.
Pooling = Literal["head", "mean"]

_BATCH = 64
_FILE = "features.safetensors"
_KEY = "features"


def linear_head(loaded: TextModel) -> str:
    """The name of the one linear module that is the model's head.

    Raises ``ConfigError`` for any other head, because its input may not be one vector for each row.
    """
    modules = [loaded.model.get_submodule(name) for name in loaded.head]
    if len(modules) != 1 or not isinstance(modules[0], nn.Linear):
        raise ConfigError(
            "task.frozen_features needs a model whose head is one linear layer; that of "
            f"{type(loaded.model).__name__} is {', '.join(type(one).__name__ for one in modules) or 'none'}"
        )
    return loaded.head[0]


def kept_features(loaded: TextModel, rows: Documents, pooling: Pooling) -> Tensor:
    """A vector for every row, ``(rows, width)``: read from the cache folder, or computed and stored there.

    The cache key is a hash of the weights below the head, the pooling and the rows' tokens.

    Raises:
        ConfigError: the head is not one linear layer whose input is one vector for each row.
        OSError: the cache folder cannot be written.
    """
    head = linear_head(loaded)
    key = f"{pooling}-{_fingerprint(loaded.model, head, rows)}"

    def build(folder: Path) -> None:
        found = {_KEY: features(loaded.model, head, rows, pooling)}
        safetensors.torch.save_file(found, folder / _FILE)

    return safetensors.torch.load_file(cached(f"features/{key}", build, private=True) / _FILE)[_KEY]


@torch.inference_mode()
def features(
    model: nn.Module, head: str, rows: Documents, pooling: Pooling, batch_size: int = _BATCH
) -> Tensor:
    """Compute a vector for every row, ``(rows, width)``, in evaluation mode.

    Raises ``ConfigError`` if the model does not give one vector for each row.
    """
    model.eval()
    width = model.get_submodule(head).get_parameter("weight").shape[1]
    device = next(model.parameters()).device
    found = torch.empty(len(rows), width)
    order = by_length(rows, len(rows))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        batch = {name: value.to(device) for name, value in rows.batch(chosen).items() if name != "labels"}
        batch = without_padding_effects(model, batch)
        vectors = _mean(model, batch) if pooling == "mean" else _handed(model, head, batch)
        if vectors.shape != (len(chosen), width):
            raise ConfigError(
                f"task.frozen_features = {pooling!r}: {type(model).__name__} gives {tuple(vectors.shape)} "
                f"for {len(chosen)} rows, but its head takes {(len(chosen), width)}, one vector for each row"
            )
        found[chosen] = vectors.float().cpu()
    return found


def _mean(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over a row's tokens of the last layer's vectors, ``(rows, width)``."""
    base = model.get_submodule(str(model.base_model_prefix))
    hidden: Tensor = base(**batch).last_hidden_state  # (rows, tokens, width)
    weight = batch["attention_mask"][..., None].to(hidden)
    return (hidden * weight).sum(dim=1) / weight.sum(dim=1)


def _handed(model: nn.Module, head: str, batch: Batch) -> Tensor:
    """The input of the module ``head``."""
    handed: list[Tensor] = []
    hook = model.get_submodule(head).register_forward_pre_hook(lambda _, inputs: handed.append(inputs[0]))
    try:
        model(**batch)
    finally:
        hook.remove()
    return handed[0]


def _fingerprint(model: nn.Module, head: str, rows: Documents) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith(f"{head}."):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for ids in (*rows.ids, *(rows.segments or ())):
        digest.update(np.array([len(ids), *ids], dtype=np.int64).data)
    return digest.hexdigest()[:32]
