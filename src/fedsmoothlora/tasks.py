"""What is learned: the loss of a batch, and what an evaluation measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsmoothlora.data.examples import Batch, Examples


class Task(Protocol):
    """A loss to train on and an evaluation."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The batch's mean loss over its samples."""
        ...

    def evaluate(
        self, model: nn.Module, examples: Examples, batch_size: int, to_device: Callable[[Batch], Batch]
    ) -> dict[str, float]:
        """Metrics by name over all examples; always ``loss``, and the task's own."""
        ...


class Classification:
    """Single-label classification by a model that returns logits ``(samples, classes)``."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of the batch."""
        return functional.cross_entropy(_logits(model, batch), batch["labels"])

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, examples: Examples, batch_size: int, to_device: Callable[[Batch], Batch]
    ) -> dict[str, float]:
        """``accuracy`` and mean cross-entropy ``loss``, summed in float64 over all examples."""
        model.eval()
        correct, loss, rows = 0, 0.0, len(examples)
        for first in range(0, rows, batch_size):
            batch = to_device(examples.batch(range(first, min(first + batch_size, rows))))
            logits, labels = _logits(model, batch).float(), batch["labels"]
            correct += int((logits.argmax(dim=-1) == labels).sum())
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        return {"accuracy": correct / rows, "loss": loss / rows}


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return model(**inputs).logits
