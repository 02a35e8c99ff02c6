"""Change tokenised inputs such that a model's outputs do not depend on padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedsmoothlora.data.examples import DeviceBatch
from fedsmoothlora.modeling.versions import has_values


def first_position(model: nn.Module) -> int:
    """The position of a row's first token: 0, or ``padding_idx + 1`` in RoBERTa and models derived from it.

    The position embeddings of these models have a ``padding_idx``, which is the position of all padding.
    Tokens do not use the positions up to it, so 514 position embeddings suffice for 512 tokens.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def positions(model: nn.Module, mask: Tensor) -> Tensor:
    """The position of every token, counted from the row's first unmasked token; ``(rows, tokens)``, int64.

    Args:
        model: the model.
        mask: 1 for tokens and 0 for padding, ``(rows, tokens)``.
    """
    return (mask.long().cumsum(dim=-1) - 1).clamp(min=0) + first_position(model)


def without_padding_effects(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Change a classifier's inputs such that the outputs for a row do not depend on its padding.

    - Padding tokens become ``config.pad_token_id``. A decoder classifies a row by its last token that is not
      ``pad_token_id``, whatever the attention mask says. RoBERTa counts positions from these tokens too.
    - Padding on the left is moved to the right, because encoders classify a row by its first token and count
      positions from there. XLNet uses the last token (``config.summary_type``), so its padding is moved to
      the left.

    Inputs without ``input_ids`` or ``attention_mask`` are returned unchanged, and so are the inputs of models
    that are not from transformers.

    Args:
        model: the model.
        inputs: ``input_ids`` and ``attention_mask``, ``(rows, tokens)``; other tensors whose first two
            dimensions are these are reordered in the same way.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    config: Any = getattr(model, "config", None)
    if ids is None or mask is None or ids.shape != mask.shape or not hasattr(config, "get_text_config"):
        return dict(inputs)
    pad = config.get_text_config().pad_token_id
    found = {**inputs, "input_ids": ids if pad is None else ids.masked_fill(mask == 0, pad)}
    reads_last = getattr(config, "summary_type", None) == "last"
    host = inputs.host["attention_mask"] if isinstance(inputs, DeviceBatch) else mask  # read without waiting
    if not has_values(host) or bool(host[:, -1 if reads_last else 0].all()):
        return found
    columns = torch.arange(mask.shape[1], device=mask.device)
    # Rotate each row such that it begins with its first token, or ends with its last.
    first = -mask.flip(dims=[1]).argmax(dim=1) if reads_last else mask.argmax(dim=1)
    order = (columns + first[:, None]) % mask.shape[1]  # (rows, tokens)
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    return {
        name: value[rows, order] if value.shape[:2] == mask.shape else value for name, value in found.items()
    }
