"""ROUGE, BLEU and exact match of generated answers, for models with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from torch import nn

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.modeling.padding import without_padding_effects
from fedsmoothlora.tasks.metrics.base import Times
from fedsmoothlora.tasks.metrics.exact_match import matches
from fedsmoothlora.tasks.metrics.greedy import greedy

_ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class GeneratedText:
    """Scores of greedily generated answers against their references.

    Attributes:
        sources: tokens of each input.
        references: the right answers.
        tokenizer: the tokenizer of the model.
        pad: the padding token.
        batch_size: number of inputs in a batch.
        max_new_tokens: largest number of tokens of an answer.
        scores: which of ``rouge``, ``bleu`` and ``exact-match`` are measured.
        times: the rounds in which they are measured.
    """

    sources: Sequence[Sequence[int]]
    references: Sequence[str]
    tokenizer: Any
    pad: int
    batch_size: int
    max_new_tokens: int
    scores: Sequence[str]
    times: Times = field(default_factory=Times)

    def due(self, round: int, rounds: int) -> bool:
        """Whether to measure it when ``round`` of ``rounds`` rounds are finished."""
        return self.times.due(round, rounds)

    def take(self, model: nn.Module, to_device: Callable[[Batch], Batch]) -> dict[str, float]:
        """``rouge1``, ``rouge2``, ``rougeL``, ``bleu`` and ``exact_match``, as far as they are wanted."""
        answers = generate_answers(
            model, self.sources, self.tokenizer, self.pad, self.batch_size, self.max_new_tokens, to_device
        )
        return scores_of(answers, self.references, self.scores)


def generate_answers(
    model: nn.Module,
    sources: Sequence[Sequence[int]],
    tokenizer: Any,
    pad: int,
    batch_size: int,
    max_new_tokens: int,
    to_device: Callable[[Batch], Batch] = lambda batch: batch,
) -> list[str]:
    """Greedy answers, in the order of the inputs. Batches hold inputs of similar length."""

    def arguments(batch: Batch) -> dict[str, Any]:
        # Settings of beam search in the checkpoint would only cause warnings.
        without = {"early_stopping": False, "length_penalty": None}
        return {**without_padding_effects(model, to_device(batch)), **without}

    return greedy(
        model,
        sources,
        tokenizer,
        pad=pad,
        left=False,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        arguments=arguments,
        answers=lambda written, _: written,
    )


def scores_of(answers: Sequence[str], references: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """The wanted scores of answers, each between 0 and 1.

    - ``rouge``: the mean over rows of the F1 of ROUGE-1, ROUGE-2 and ROUGE-L, by Google's ``rouge_score``
      without stemming (``rouge1``, ``rouge2``, ``rougeL``).
    - ``bleu``: BLEU of all rows together, by ``sacrebleu`` with its defaults, divided by 100 (``bleu``).
    - ``exact-match``: the share of answers that agree with their references (`exact_match.matches`).

    Args:
        answers: the generated texts.
        references: the right texts.
        wanted: names of the scores.
    """
    found: dict[str, float] = {}
    if "rouge" in wanted:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(_ROUGE))
        rows = [scorer.score(right, own) for own, right in zip(answers, references, strict=True)]
        found |= {name: fmean(float(row[name].fmeasure) for row in rows) for name in _ROUGE}
    if "bleu" in wanted:
        import sacrebleu

        found["bleu"] = float(sacrebleu.corpus_bleu(list(answers), [list(references)]).score) / 100
    if "exact-match" in wanted:
        found["exact_match"] = fmean(map(matches, answers, references))
    return found
