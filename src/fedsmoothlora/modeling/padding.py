"""Inputs of tokens for which a model's outputs do not depend on padding."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def first_position(model: nn.Module) -> int:
    """The position of a row's first token: 0, but ``padding_idx + 1`` in RoBERTa and its kin.

    Their position embeddings have a ``padding_idx``, the position of all padding. The positions up to it are
    of no use to tokens, so that 514 position embeddings are enough for 512 tokens.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def positions(model: nn.Module, mask: Tensor) -> Tensor:
    """The position of every token, counted from the first that the mask shows; ``(rows, tokens)``, int64.

    Args:
        model: the model.
        mask: 1 for tokens and 0 for padding, ``(rows, tokens)``.
    """
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0) + first_position(model)


def takes_positions(model: nn.Module) -> bool:
    """Whether a model can be told the positions of its tokens."""
    return "position_ids" in inspect.signature(model.forward).parameters


def without_padding_effects(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs changed such that the outputs for a row do not depend on its padding.

    - Padding becomes ``config.pad_token_id``. A decoder that classifies reads a row at the last token that
      differs from it, whatever the attention mask says. RoBERTa counts positions likewise.
    - In a batch with padding on the left, ``position_ids`` count from each row's first token, if the model
      takes them.

    Inputs without ``input_ids`` or their mask stay as they are, and so do those of models that are not
    transformers'.
    """
    found = dict(inputs)
    ids, mask = found.get("input_ids"), found.get("attention_mask")
    config = getattr(model, "config", None)
    if ids is None or mask is None or ids.shape != mask.shape or not hasattr(config, "get_text_config"):
        return found
    pad = config.get_text_config().pad_token_id
    if pad is not None:
        found["input_ids"] = ids.masked_fill(mask == 0, pad)
    left = not mask.is_meta and bool((mask[:, 0] == 0).any())
    if left and "position_ids" not in found and takes_positions(model):
        found["position_ids"] = positions(model, mask)
    return found
