"""Greedy generation in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.tokens import padded


@torch.inference_mode()
def greedy(
    model: nn.Module,
    inputs: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    pad: int,
    left: bool,
    batch_size: int,
    max_new_tokens: int,
    arguments: Callable[[Batch], Mapping[str, Any]],
    answers: Callable[[Tensor, int], Sequence[Sequence[int]] | Tensor],
) -> list[str]:
    """Greedy answers, in the order of the inputs.

    Args:
        model: a model of transformers with ``generate``.
        inputs: tokens of each input.
        tokenizer: the tokenizer of the model.
        pad: the padding token.
        left: whether inputs are padded on the left.
        batch_size: number of inputs in a batch.
        max_new_tokens: largest number of tokens of an answer.
        arguments: the arguments of ``generate`` for ``input_ids`` and ``attention_mask`` of a batch, with
            further settings.
        answers: the tokens of the answers in the output of ``generate``, given the padded length of inputs.
    """
    model.eval()
    texts = [""] * len(inputs)
    order = sorted(range(len(inputs)), key=lambda row: len(inputs[row]))
    generate: Any = model.generate
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        chosen = [list(inputs[row]) for row in rows]
        batch = {
            "input_ids": padded(chosen, pad, left=left),
            "attention_mask": padded([[1] * len(ids) for ids in chosen], 0, left=left),
        }
        written = generate(
            **arguments(batch),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            # Sampling settings of the checkpoint have no effect on greedy decoding, and would cause warnings.
            temperature=None,
            top_p=None,
            top_k=None,
        )
        found = answers(written, batch["input_ids"].shape[1])
        for row, text in zip(rows, tokenizer.batch_decode(found, skip_special_tokens=True), strict=True):
            texts[row] = text
    return texts
