"""The common part of objectives whose model returns one vector of logits for each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fedsmoothlora.data.examples import Batch, Examples, without
from fedsmoothlora.data.tokens import TokenBudget, by_length, cut
from fedsmoothlora.modeling.padding import without_padding_effects


class RowLogits:
    """An objective of a model that returns logits ``(rows, outputs)``.

    A batch holds ``labels`` and the inputs of the model. A single input called ``inputs`` is passed by
    position, others by name. The model returns the logits, or an object with the attribute ``logits``.

    Args:
        arguments: further arguments of the model, the same for every batch.
        head: name of the module that is called in place of the model, if batches hold the inputs of the head.
    """

    def __init__(
        self, arguments: Mapping[str, Any] = MappingProxyType({}), *, head: str | None = None
    ) -> None:
        self._arguments = dict(arguments)
        self._head = head

    def parts(self, batch: Batch, count: int | TokenBudget) -> Sequence[tuple[Batch, float]]:
        """The batch in parts, each with its share of the rows."""
        labels = batch["labels"]
        rows = torch.arange(len(labels), device=labels.device)
        # Several labels of a row are no tokens, so they are not cut with these.
        return [
            ({**part, "labels": labels[part["labels"]]}, len(part["labels"]) / len(labels))
            for part in cut({**batch, "labels": rows}, count)
        ]

    @torch.inference_mode()
    def _predicted(
        self, model: nn.Module, examples: Examples, batch_size: int, to_device: Callable[[Batch], Batch]
    ) -> tuple[Tensor, Tensor]:
        """Logits, float32, and labels of all examples, on the CPU; rows are in the order of their lengths."""
        model.eval()
        rows = len(examples)
        order = by_length(examples, rows)
        parts, labels = [], []
        for first in range(0, rows, batch_size):
            batch = to_device(examples.batch(order[first : first + batch_size]))
            parts.append(self._logits(model, batch).float().cpu())
            labels.append(batch["labels"].cpu())
        return torch.cat(parts), torch.cat(labels)

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        if self._head is not None:
            model = model.get_submodule(self._head)
        inputs = without(batch, "labels")
        if list(inputs) == ["inputs"]:
            output = model(inputs["inputs"], **self._arguments)
        else:
            output = model(**without_padding_effects(model, inputs), **self._arguments)
        return output if isinstance(output, Tensor) else output.logits
