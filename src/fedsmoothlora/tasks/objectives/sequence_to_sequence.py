"""Sequence to sequence: loss and perplexity of the answers of an encoder with a decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsmoothlora.data.examples import Batch, Examples, without
from fedsmoothlora.data.tokens import IGNORED, TokenBudget, by_length, cut, narrowed
from fedsmoothlora.errors import DataError
from fedsmoothlora.modeling.padding import without_padding_effects
from fedsmoothlora.tasks.objectives.base import Evaluation
from fedsmoothlora.tasks.objectives.tokens import mean_of_tokens, shares


class SequenceToSequence:
    """Prediction of the next answer token by a model of transformers with an encoder and a decoder.

    A batch holds ``input_ids`` and ``attention_mask``, ``(rows, tokens)``, and ``labels``,
    ``(rows, columns)``: the tokens of the answers, -100 where no loss is taken. The model shifts
    them by one for its decoder.
    """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of all answer tokens of the batch; each token has the same weight."""
        logits = _logits(model, batch)
        labels = batch["labels"]
        return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean cross-entropy of every row over its answer tokens, ``(rows,)``; 0 if it has none."""
        logits, labels = _logits(model, batch), batch["labels"]
        return mean_of_tokens(logits, labels)

    def parts(self, batch: Batch, count: int | TokenBudget) -> Sequence[tuple[Batch, float]]:
        """The batch in parts of rows of similar length, each with its share of the answer tokens."""
        answers = {"attention_mask": (batch["labels"] != IGNORED).long(), "labels": batch["labels"]}
        rows = torch.arange(len(batch["labels"]), device=batch["labels"].device)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        found = []
        for part in cut({**inputs, "labels": rows}, count):
            own = {name: value[part["labels"]] for name, value in answers.items()}
            found.append({**part, "labels": narrowed(own)["labels"]})
        return shares(batch, found, lambda part: int((part["labels"] != IGNORED).sum()))

    def check_labels(self, labels: Tensor) -> None:
        """Raise ``DataError`` for labels ``(rows, columns)`` that are not tokens."""
        if labels.is_floating_point() or labels.ndim != 2:
            raise DataError("sequence to sequence needs the tokens of the answers as labels, (rows, columns)")

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, examples: Examples, batch_size: int, to_device: Callable[[Batch], Batch]
    ) -> Evaluation:
        """``loss``, the mean of ``-log p(token | before)`` over answer tokens, and its ``perplexity``."""
        model.eval()
        order = by_length(examples, len(examples))
        total, tokens = 0.0, 0
        for first in range(0, len(order), batch_size):
            batch = to_device(examples.batch(order[first : first + batch_size]))
            losses = functional.cross_entropy(
                _logits(model, batch).float().flatten(0, 1),
                batch["labels"].flatten(),
                ignore_index=IGNORED,
                reduction="none",
            )
            total += float(losses.double().sum())
            tokens += int((batch["labels"] != IGNORED).sum())
        loss = total / tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Evaluation({"loss": loss, "perplexity": perplexity}, weight=tokens)


def _logits(model: Any, batch: Batch) -> Tensor:
    """The logits of every label, ``(rows, columns, vocabulary)``."""
    inputs = without_padding_effects(model, without(batch, "labels"))
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    # A model without that method (M2M100, Blenderbot) shifts labels in its forward pass only.
    answers = {"labels": batch["labels"]} if shift is None else {"decoder_input_ids": shift(batch["labels"])}
    logits: Tensor = model(**inputs, **answers, use_cache=False).logits
    return logits
