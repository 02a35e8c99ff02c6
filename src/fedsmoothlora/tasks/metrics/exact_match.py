"""Exact match of generated answers: by their numbers where there are any, by their words otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import torch
from torch import nn

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.texts import normalised
from fedsmoothlora.data.tokens import padded
from fedsmoothlora.tasks.metrics.base import Times

_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<![\w.])-?\.\d+")


@dataclass(frozen=True)
class ExactMatch:
    """The share of prompts that the model, generating greedily, answers as the reference does.

    Attributes:
        prompts: tokens of each prompt.
        references: the right answers.
        tokenizer: of the model.
        batch_size: prompts at once.
        max_new_tokens: where an answer that does not end is cut.
        marker: if set, only what follows its last occurrence counts, in reference and answer.
        times: when it is taken.
    """

    prompts: Sequence[Sequence[int]]
    references: Sequence[str]
    tokenizer: Any
    batch_size: int
    max_new_tokens: int
    marker: str | None = None
    times: Times = field(default_factory=Times)

    def due(self, round: int, rounds: int) -> bool:
        """Whether to take it when ``round`` of ``rounds`` rounds are finished."""
        return self.times.due(round, rounds)

    def take(self, model: nn.Module, to_device: Callable[[Batch], Batch]) -> dict[str, float]:
        """``exact_match``."""
        answers = generate(
            model, self.prompts, self.tokenizer, self.batch_size, self.max_new_tokens, to_device
        )
        pairs = zip(answers, self.references, strict=True)
        return {"exact_match": sum(matches(a, r, self.marker) for a, r in pairs) / len(answers)}


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    batch_size: int,
    max_new_tokens: int,
    to_device: Callable[[Batch], Batch] = lambda batch: batch,
) -> list[str]:
    """Greedy answers to prompts, in their order; prompts of like length are padded on the left together."""
    model.eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    write: Any = model.generate
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        chosen = [list(prompts[row]) for row in rows]
        batch = to_device(
            {
                "input_ids": padded(chosen, pad, left=True),
                "attention_mask": padded([[1] * len(ids) for ids in chosen], 0, left=True),
            }
        )
        written = write(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            # What a checkpoint's own settings say of sampling has no meaning here, and would warn.
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=pad,
        )
        new = written[:, batch["input_ids"].shape[1] :].tolist()
        # A row that ends before the others is filled with padding, which need not be a special token.
        ended = [ids[: ids.index(end) + 1] if (end := tokenizer.eos_token_id) in ids else ids for ids in new]
        for row, text in zip(rows, tokenizer.batch_decode(ended, skip_special_tokens=True), strict=True):
            answers[row] = text
    return answers


def matches(answer: str, reference: str, marker: str | None = None) -> bool:
    """Whether an answer says what the reference says.

    A reference with ``k`` numbers is matched by an answer whose last ``k`` numbers are the same, in order and
    by value: ``1,200`` is ``1200.0``. A reference without numbers is matched by the same words.

    Args:
        answer: what was generated.
        reference: what is right.
        marker: if set, only what follows its last occurrence counts, in both; an answer without it is wrong.
    """
    if marker is not None:
        if marker not in answer and marker in reference:
            return False
        answer, reference = (text.rpartition(marker)[2] for text in (answer, reference))
    wanted = numbers(reference)
    if not wanted:
        return normalised(answer) == normalised(reference)
    return numbers(answer)[-len(wanted) :] == wanted


def numbers(text: str) -> list[Decimal]:
    """The numbers in a text, in order; commas between thousands are left out."""
    return [Decimal(found.replace(",", "")) for found in _NUMBER.findall(text)]
