"""Losses of rows of tokens."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fedsmoothlora.data.tokens import IGNORED


def mean_of_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of every row over its labelled tokens, ``(rows,)``; 0 for a row without any.

    Args:
        logits: ``(rows, tokens, outputs)``.
        labels: ``(rows, tokens)``; -100 where no loss is taken.
    """
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    counts = (labels != IGNORED).sum(dim=1).clamp(min=1)
    return losses.view(labels.shape).sum(dim=1) / counts
