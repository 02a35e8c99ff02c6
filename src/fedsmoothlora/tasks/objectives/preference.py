"""Direct preference optimisation: the loss of pairs of answers, and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsmoothlora.data.examples import Batch, Examples, without
from fedsmoothlora.data.tokens import TokenBudget, by_length, cut
from fedsmoothlora.tasks.objectives.base import Evaluation
from fedsmoothlora.tasks.objectives.language import log_likelihoods

_ROUNDING = 1e-6  # relative, of a log-probability computed in float32


class DirectPreference:
    """Direct preference optimisation (DPO; Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    The reward of an answer ``y`` to a prompt ``x`` is ``beta (log p(y | x) - log p_ref(y | x))``. The loss of
    a pair is ``-log sigmoid(reward of the chosen answer - reward of the rejected answer)``, and that of a
    batch is the mean over its pairs.

    Batches are those of `fedsmoothlora.data.tokens.Pairs`: rows ``2 i`` and ``2 i + 1`` are pair ``i``, and
    ``reference`` holds ``log p_ref``.

    Args:
        beta: the strength with which the model is held to the reference.
    """

    pads_left: ClassVar[bool] = True

    def __init__(self, beta: float) -> None:
        self._beta = beta

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss of the pairs."""
        return -functional.logsigmoid(self._margins(model, batch)).mean()

    def parts(self, batch: Batch, count: int | TokenBudget) -> Sequence[tuple[Batch, float]]:
        """The batch in parts of whole pairs, each with its share of the pairs."""
        rows = len(batch["labels"])
        return [(part, len(part["labels"]) / rows) for part in cut(batch, count, together=2)]

    @torch.inference_mode()
    def evaluate(
        self, model: nn.Module, examples: Examples, batch_size: int, to_device: Callable[[Batch], Batch]
    ) -> Evaluation:
        """``loss``, ``preference_accuracy`` and ``reward_margin``, means over pairs.

        The margin of a pair is the reward of the chosen answer minus that of the rejected one, and its
        preference is right if the margin is positive. A margin within the rounding of float32 counts half:
        before training, all rewards are 0, but batches of other rows round differently.
        """
        model.eval()
        order = by_length(examples, len(examples))
        found: list[Tensor] = []
        right: list[Tensor] = []
        for first in range(0, len(order), batch_size):
            batch = to_device(examples.batch(order[first : first + batch_size]))
            margins = self._margins(model, batch).cpu()
            rounding = _ROUNDING * self._beta * batch["reference"].double().abs().view(-1, 2).sum(dim=1).cpu()
            found.append(margins)
            right.append(torch.where(margins.abs() <= rounding, 0.5, (margins > 0).double()))
        margins = torch.cat(found)
        return Evaluation(
            {
                "loss": float(-functional.logsigmoid(margins).mean()),
                "preference_accuracy": float(torch.cat(right).mean()),
                "reward_margin": float(margins.mean()),
            }
        )

    def _margins(self, model: nn.Module, batch: Batch) -> Tensor:
        """The reward of the chosen answer minus that of the rejected one, ``(pairs,)``, float64."""
        likelihoods, _ = log_likelihoods(model, without(batch, "reference"))
        rewards = self._beta * (likelihoods - batch["reference"].double())
        return rewards[0::2] - rewards[1::2]


@torch.inference_mode()
def answer_likelihoods(
    model: nn.Module, answers: Examples, batch_size: int, to_device: Callable[[Batch], Batch]
) -> Tensor:
    """The log-probability of every answer, ``(answers,)``, float32, in evaluation mode.

    Args:
        model: a causal language model.
        answers: prompts with answers, such as `fedsmoothlora.data.tokens.Completions`.
        batch_size: number of answers in a batch.
        to_device: moves a batch to the device of the model.
    """
    model.eval()
    found = torch.empty(len(answers))
    order = by_length(answers, len(answers))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        likelihoods, _ = log_likelihoods(model, to_device(answers.batch(rows)))
        found[rows] = likelihoods.float().cpu()
    return found
