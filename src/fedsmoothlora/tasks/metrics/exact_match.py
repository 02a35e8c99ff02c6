"""Exact match of generated answers: quantities by value, everything else as text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from torch import Tensor, nn

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.tasks.metrics.base import Times
from fedsmoothlora.tasks.metrics.greedy import greedy

# A worked solution of GSM8K ends with this mark and the result.
_RESULT_MARK = "####"

_LETTERS = r"[^\W\d_]+"
_NUMBER = r"-?[$€£¥]?-?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)[%°]?"
# Neither the 19 of "COVID-19" nor the 4 of "not 4" is a quantity, but the 5 of "10-5" is.
_QUANTITY = re.compile(
    rf"(?<![\w.])(?<!\D-)(?<!\bnot )(?P<number>{_NUMBER})(?P<unit>(?: ?\(?{_LETTERS})*)", re.IGNORECASE
)
_NUMBERS = re.compile(rf"{_NUMBER}(?::{_NUMBER})*")
_NUMBERS_OR_WORD = re.compile(rf"{_NUMBERS.pattern}|\(?{_LETTERS}(?:\.{_LETTERS})*\)?")
_CONNECTIVES = ("and", "or")

_CLOSING = ".,;:!?…。、，；：！？"
_OPENING = "¿¡"
_ENCLOSING = ("()", '""', "''", "“”", "‘’", "„“", "«»")


@dataclass(frozen=True)
class ExactMatch:
    """The share of prompts whose greedily generated answer agrees with the reference (`matches`).

    Attributes:
        prompts: tokens of each prompt.
        references: the right answers.
        tokenizer: the tokenizer of the model.
        batch_size: number of prompts in a batch.
        max_new_tokens: largest number of tokens of an answer.
        marker: text that introduces the result in references and answers.
        times: the rounds in which it is measured.
    """

    prompts: Sequence[Sequence[int]]
    references: Sequence[str]
    tokenizer: Any
    batch_size: int
    max_new_tokens: int
    marker: str | None = None
    times: Times = field(default_factory=Times)

    def due(self, round: int, rounds: int) -> bool:
        """Whether to measure it when ``round`` of ``rounds`` rounds are finished."""
        return self.times.due(round, rounds)

    def take(self, model: nn.Module, to_device: Callable[[Batch], Batch]) -> dict[str, float]:
        """``exact_match``."""
        answers = generate(
            model, self.prompts, self.tokenizer, self.batch_size, self.max_new_tokens, to_device
        )
        pairs = zip(answers, self.references, strict=True)
        return {"exact_match": sum(matches(a, r, self.marker) for a, r in pairs) / len(answers)}


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    batch_size: int,
    max_new_tokens: int,
    to_device: Callable[[Batch], Batch] = lambda batch: batch,
) -> list[str]:
    """Greedy answers, in the order of the prompts. Batches are of similar length and padded on the left."""
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end

    def answers(written: Tensor, length: int) -> list[list[int]]:
        new = written[:, length:].tolist()
        # A row that ends before the others is filled with padding, which need not be a special token.
        return [ids[: ids.index(end) + 1] if end in ids else ids for ids in new]

    return greedy(
        model,
        prompts,
        tokenizer,
        pad=pad,
        left=True,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        arguments=lambda batch: {**to_device(batch), "eos_token_id": end, "pad_token_id": pad},
        answers=answers,
    )


def matches(answer: str, reference: str, marker: str | None = None) -> bool:
    """Whether an answer agrees with the reference.

    1. With a ``marker``, only the text after its last occurrence is compared, in both; an answer without it
       is wrong. A reference with ``####`` (GSM8K) is compared from there on, and so is the answer if it has
       that mark.
    2. A reference that begins with a number and holds only numbers and words, such as ``1,200``, ``$3.50``,
       ``9 apples`` or ``3:30 p.m.``, is a list of ``k`` quantities. The last ``k`` quantities of the answer
       must agree with it in order: the values are equal (``1,200`` is ``1200.0``), and neither currency or
       percent signs nor the words that follow directly contradict each other. They do not if one side has
       none, or if the words of one side begin with those of the other. The number in ``COVID-19`` or
       ``not 4`` is no quantity.
    3. Any other reference is compared as text: without regard to case, the width of white space, quotation
       marks or round brackets around the whole, and sentence punctuation at the end of a word. Nothing else
       is removed, and never all of a text: ``C`` is not ``C++``, and ``?`` is not ``!``.

    Args:
        answer: the generated text.
        reference: the right answer.
        marker: text that introduces the result.
    """
    if marker is not None:
        if marker not in answer and marker in reference:
            return False
        answer, reference = (text.rpartition(marker)[2] for text in (answer, reference))
    if _RESULT_MARK in reference:
        answer, reference = (text.rpartition(_RESULT_MARK)[2] for text in (answer, reference))
    if not _is_quantities(reference):
        return comparable(answer) == comparable(reference)
    wanted = _quantities(reference)
    found = _quantities(answer)[-len(wanted) :]
    return len(found) == len(wanted) and all(
        mine.agrees_with(right) for mine, right in zip(found, wanted, strict=True)
    )


def comparable(text: str) -> str:
    """A text without differences that do not matter; see rule 3 of `matches`."""
    text = unicodedata.normalize("NFC", text).casefold().strip()
    for marks in _ENCLOSING:
        inner = text[1:-1].strip()
        if inner and text[0] + text[-1] == marks and not set(marks) & set(inner):
            text = inner
    text = text.rstrip(_CLOSING).rstrip() or text
    return " ".join(word.lstrip(_OPENING).rstrip(_CLOSING) or word for word in text.split())


@dataclass(frozen=True)
class _Quantity:
    """A number in a text, its currency or percent sign, and the words right after it."""

    value: Decimal
    sign: str
    unit: tuple[str, ...]

    def agrees_with(self, other: _Quantity) -> bool:
        words = min(len(self.unit), len(other.unit))
        return (
            self.value == other.value
            and (not self.sign or not other.sign or self.sign == other.sign)
            and self.unit[:words] == other.unit[:words]
        )


def _is_quantities(reference: str) -> bool:
    """Whether a reference begins with a number and holds numbers and words only."""
    words = [word.rstrip(_CLOSING) for word in _with_hyphens(reference).split()]
    return bool(words and _NUMBERS.fullmatch(words[0])) and all(map(_NUMBERS_OR_WORD.fullmatch, words))


def _quantities(text: str) -> list[_Quantity]:
    found = []
    for match in _QUANTITY.finditer(_with_hyphens(text)):
        number = match["number"]
        unit = re.findall(_LETTERS, match["unit"].casefold())
        found.append(
            _Quantity(
                value=Decimal(re.sub(r"[^\d.-]", "", number).replace("--", "")),
                sign=re.sub(r"[\d.,-]", "", number),
                unit=tuple(word for word in unit if word not in _CONNECTIVES),
            )
        )
    return found


def _with_hyphens(text: str) -> str:
    """The text with the minus sign of the keyboard."""
    return text.replace("\N{MINUS SIGN}", "-")
