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
from fedsmoothlora.tasks.objectives.tokens import mean_of_tokens, shares


class CausalLanguageModel:
    """Next-token prediction by a model that returns logits ``(rows, tokens, vocabulary)``.

    A batch holds ``input_ids``, ``attention_mask`` and ``labels``. A label is the token itself, or -100 where
    no loss is taken: in prompts and padding. ``labels`` has one column for each of the last columns of
    ``input_ids``, or for all of them. The shift by one is made here. The label of a row's first token is not
    used, because no token precedes it.
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
        return shares(batch, cut(batch, count), lambda part: int((predicted_labels(part) != IGNORED).sum()))

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
    labels, width = predicted_labels(batch), batch["input_ids"].shape[1]
    columns = labels.shape[1]
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    accepted = inspect.signature(model.forward).parameters
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
    # Checked on the host, where that does not wait for the device.
    _check_tokens(predicted_labels(on_host(batch)), logits.shape[-1])
    return (logits if logits.shape[1] == columns else logits[:, -(columns + 1) : -1]), labels


def predicted_labels(batch: Batch) -> Tensor:
    """The labels of the last columns that a token before them predicts, ``(rows, columns)``.

    -100 takes the place of the label of a row's first token after padding on the left. Otherwise the loss
    would depend on the other rows of the batch.
    """
    labels, ids, mask = batch["labels"], batch["input_ids"], batch.get("attention_mask")
    width = ids.shape[1]
    columns = min(labels.shape[1], width - 1)
    labels = labels[:, labels.shape[1] - columns :]
    if mask is None or mask.shape != ids.shape:
        return labels
    return labels.masked_fill(mask[:, width - 1 - columns : width - 1] == 0, IGNORED)


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
