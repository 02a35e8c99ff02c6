"""Multiple choice: the option that is most likely as the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.tokens import Completions, by_length
from fedsmoothlora.tasks.metrics.base import Times
from fedsmoothlora.tasks.objectives.language import log_likelihoods


@dataclass(frozen=True)
class MultipleChoice:
    """The share of questions whose right option has the highest ``sum log p(token | before)``.

    Attributes:
        options: prompt and option of every question, one after the other.
        counts: number of options of each question.
        right: index of the right option of each question, from 0.
        batch_size: number of options in a batch.
        times: the rounds in which it is measured.
    """

    options: Completions
    counts: Sequence[int]
    right: Sequence[int]
    batch_size: int
    times: Times = field(default_factory=Times)

    def due(self, round: int, rounds: int) -> bool:
        """Whether to measure it when ``round`` of ``rounds`` rounds are finished."""
        return self.times.due(round, rounds)

    def take(self, model: nn.Module, to_device: Callable[[Batch], Batch]) -> dict[str, float]:
        """``accuracy``. Of equally likely options, the first is the answer of the model."""
        scores = self.scores(model, to_device).split(list(self.counts))
        hits = [int(own.argmax()) == right for own, right in zip(scores, self.right, strict=True)]
        return {"accuracy": sum(hits) / len(hits)}

    @torch.inference_mode()
    def scores(self, model: nn.Module, to_device: Callable[[Batch], Batch]) -> Tensor:
        """The log-likelihood of every option, ``(options,)``, float64."""
        model.eval()
        scores = torch.empty(len(self.options), dtype=torch.float64)
        order = by_length(self.options, len(self.options))
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            likelihoods, _ = log_likelihoods(model, to_device(self.options.batch(rows)))
            scores[rows] = likelihoods.cpu()
        return scores
