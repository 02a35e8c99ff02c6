"""Losses of rows of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.nn import functional

from fedsmoothlora.data.examples import Batch
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


def shares(batch: Batch, parts: Sequence[Batch], mass: Callable[[Batch], float]) -> list[tuple[Batch, float]]:
    """The parts of a batch, each with its share of the batch's mean loss.

    A part without labels has no mean of its own and adds nothing to that of the batch, so it is left out. If
    no part has labels, all of them stay, so that the loss is not a number, as that of the whole batch.

    Args:
        batch: the batch.
        parts: its parts.
        mass: the number of labels of a batch or part, or the sum of their weights.
    """
    if not (whole := mass(batch)):
        return [(part, 1.0) for part in parts]
    return [(part, own / whole) for part in parts if (own := mass(part))]
