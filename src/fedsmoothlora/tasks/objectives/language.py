"""Causal language modelling: loss and perplexity of the answers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsmoothlora.data.examples import Batch, Examples, on_host
from fedsmoothlora.data.tokens import IGNORED, TokenBudget, by_length, cut
from fedsmoothlora.errors import DataError
from fedsmoothlora.modeling.padding import positions
from fedsmoothlora.modeling.versions import has_values
from fedsmoothlora.tasks.objectives.base import Evaluation
from fedsmoothlora.tasks.objectives.tokens import mean_of_tokens


class CausalLanguageModel:
    """Next-token prediction by a model that returns logits ``(rows, tokens, vocabulary)``.

    A batch holds ``input_ids``, ``attention_mask`` and ``labels``. A label is the token itself, or -100 where
    no loss is taken: in prompts and padding. ``labels`` has one column for each of the last columns of
    ``input_ids``, or for all of them. The shift by one is made here.
    """

    pads_left: ClassVar[bool] = True

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of all answer tokens of the batch; each token has the same weight."""
        logits, labels = answer_logits(model, batch)
        return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean cross-entropy of every row over its answer tokens, ``(rows,)``; 0 if it has none."""
        logits, labels = answer_logits(model, batch)
        return mean_of_tokens(logits, labels)

    def parts(self, batch: Batch, count: int | TokenBudget) -> Sequence[tuple[Batch, float]]:
        """The batch in parts of rows of similar length, each with its share of the answer tokens."""
        tokens = int((batch["labels"] != IGNORED).sum())
        return [(part, int((part["labels"] != IGNORED).sum()) / tokens) for part in cut(batch, count)]

    def check_labels(self, labels: Tensor) -> None:
        """Raise ``DataError`` for labels ``(rows, columns)`` that are not tokens."""
        _check_tokens(labels)

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, examples: Examples, batch_size: int, to_device: Callable[[Batch], Batch]
    ) -> Evaluation:
        """``loss``, the mean of ``-log p(token | before)`` over answer tokens, and ``perplexity``, its exp.

        Each token has the same weight, so a long answer counts for more than a short one.
        """
        model.eval()
        order = by_length(examples, len(examples))
        total, tokens = 0.0, 0
        for first in range(0, len(order), batch_size):
            batch = to_device(examples.batch(order[first : first + batch_size]))
            likelihoods, counts = log_likelihoods(model, batch)
            total -= float(likelihoods.sum())
            tokens += int(counts.sum())
        loss = total / tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return Evaluation({"loss": loss, "perplexity": perplexity}, weight=tokens)


def answer_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits of every label, ``(rows, columns, vocabulary)``, and the labels, ``(rows, columns)``.

    Raises ``DataError`` for labels that are not tokens of the model.
    """
    labels, width = batch["labels"], batch["input_ids"].shape[1]
    checked = on_host(batch)["labels"]  # where that does not wait for the device
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    accepted = inspect.signature(model.forward).parameters
    columns = labels.shape[1]
    if columns >= width:  # no token precedes the first, so none predicts it
        labels, checked, columns = labels[:, 1 - width :], checked[:, 1 - width :], width - 1
    if "position_ids" in accepted and "attention_mask" in inputs and "position_ids" not in inputs:
        # Padding on the left must not move a row's positions.
        inputs["position_ids"] = positions(model, inputs["attention_mask"])
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    if "logits_to_keep" in accepted:
        # As positions, not as their number, because positions pick a contiguous block. For a slice of the
        # hidden states, the matrix product of a head copies its weight for every row.
        inputs["logits_to_keep"] = torch.arange(width - 1 - columns, width - 1, device=labels.device)
    output = model(**inputs)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    _check_tokens(checked, logits.shape[-1])
    return (logits if logits.shape[1] == columns else logits[:, -(columns + 1) : -1]), labels


def _check_tokens(labels: Tensor, vocabulary: int | None = None) -> None:
    """Raise ``DataError`` for labels that are neither tokens nor -100."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(f"the labels are {labels.dtype}: a language model needs tokens, which are integers")
    if not has_values(labels):
        return
    wrong = labels[(labels < 0) & (labels != IGNORED) | (labels >= (vocabulary or torch.inf))]
    if len(wrong):
        most = "" if vocabulary is None else f" to {vocabulary - 1}"
        raise DataError(
            f"the label {int(wrong[0])} in the data is no token: tokens are 0{most or ' and above'}, and "
            f"{IGNORED} marks tokens without a loss"
        )


def log_likelihoods(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The log-probability of each answer, float64, and the number of its tokens; both ``(rows,)``."""
    logits, labels = answer_logits(model, batch)
    losses = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view(labels.shape).double().sum(dim=1), (labels != IGNORED).sum(dim=1)
