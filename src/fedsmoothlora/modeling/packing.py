"""Whether a model keeps rows apart that are packed into one sequence."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fedsmoothlora.errors import ConfigError

_ROW = 4  # tokens of a row of the probe
_APART, _ALONE = 1e-5, 0.02  # largest differences, in standard deviations of the logits


def check_packing(model: nn.Module, source: str) -> None:
    """Raise ``ConfigError`` unless rows of one sequence neither attend to each other nor share positions.

    Two rows are put side by side. Other tokens in the first row must not change the logits of the second, and
    these must be, but for rounding, the logits of the second row alone. On the meta device, which has no
    values, only the arguments of the model are checked.

    Args:
        model: a causal language model.
        source: ``model.source``, for the message.
    """
    accepted = inspect.signature(model.forward).parameters
    if "position_ids" not in accepted:
        raise ConfigError(f"task.packing = true: {_named(model, source)} takes no position_ids; remove it")
    device = next(model.parameters()).device
    if device.type == "meta":
        return
    tokens = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    first, other, second = (
        torch.arange(start, start + _ROW, device=device).remainder(tokens) for start in (1, 11, 21)
    )
    was_training = model.training
    model.eval()
    try:
        one, changed = (_logits(model, [row, second])[:, _ROW:] for row in (first, other))
        alone = _logits(model, [second])
    finally:
        model.train(was_training)
    size = float(alone.std())
    apart = float((one - changed).abs().max()) <= _APART * size
    if not apart or float((one - alone).abs().max()) > _ALONE * size:
        raise ConfigError(
            f"task.packing = true: {_named(model, source)} lets rows of one sequence see each other; remove "
            "it"
        )


@torch.inference_mode()
def _logits(model: nn.Module, rows: list[Tensor]) -> Tensor:
    """The logits of two sequences of these rows each, ``(2, tokens, vocabulary)``."""
    ids = torch.cat(rows).expand(2, -1)
    positions = torch.cat([torch.arange(len(row), device=row.device) for row in rows]).expand(2, -1)
    more: dict[str, Any] = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )
    logits: Tensor = model(input_ids=ids, position_ids=positions, **more).logits
    return logits.float()


def _named(model: nn.Module, source: str) -> str:
    return f"{source} ({type(model).__name__})"
