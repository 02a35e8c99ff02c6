"""Directions of starts by two, three or four power steps, against exact singular vectors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.rows import Row, interleaved
from fedsmoothlora.algebra import spectral
from fedsmoothlora.config import read
from fedsmoothlora.runs.planning import build, plan
from fedsmoothlora.training.calibration import calibration_gradients

_STEPS, _REPETITIONS, _BATCH_SIZE = (2, 3, 4), 5, 8
# By model: the recipe, and one in how many layers is measured. A block of SmolLM2 has seven kinds.
_MODELS = {"ViT-S": ("quickstart", 1), "SmolLM2-135M": ("smollm2-asdiv", 8)}


def rows() -> Iterator[Row]:
    """Calibration gradients of the first client of a recipe, before round 0; ranks are the recipes'."""
    for title, (recipe, every) in _MODELS.items():
        rank, gradients = _gradients(recipe, every)
        count = 2 * rank
        exact = [torch.linalg.svd(G.double(), full_matrices=False) for G in gradients]
        calls: dict[str, Callable[[], object]] = {"exact": partial(_exactly, gradients, count)}
        for steps in _STEPS:
            calls[str(steps)] = partial(_directions, gradients, count, steps)
        times = interleaved(calls, _REPETITIONS)
        for steps in _STEPS:
            name = f"{title}, r = {rank}, {steps} steps"
            found = _directions(gradients, count, steps)
            lost = [
                max(0.0, 1 - _overlap(P[:, rank:], U[:, rank:count]))
                for (P, _, _), (U, _, _) in zip(found, exact, strict=True)
            ]
            yield Row(
                name=f"{name}: seconds against a tolerance of 1e-4",
                value=times[str(steps)],
                unit="s",
                against=times["exact"],
            )
            for which, value in (("mean", statistics.mean(lost)), (f"most of {len(lost)} layers", max(lost))):
                yield Row(
                    name=f"{name}: share of P[:, r:2r] outside the exact space, {which}",
                    value=1e6 * value,
                    unit="millionths",
                    against=1e6,
                )


def _gradients(recipe: str, every: int) -> tuple[int, list[Tensor]]:
    """The rank, and the gradients of one in ``every`` layers."""
    changes = {"training.batch_size": _BATCH_SIZE, "machine.threads": torch.get_num_threads()}
    simulation = build(plan(read(recipe, changes)))
    learner, data = simulation.learner, next(iter(simulation.clients.values()))
    learner.model.load_head(learner.initial_state.head)
    modules = dict(list(learner.model.modules.items())[::every])
    batches = [data.batch(range(k * _BATCH_SIZE, (k + 1) * _BATCH_SIZE)) for k in range(4)]
    with learner.model.without_lora():
        gradients = calibration_gradients(learner.model.model, modules, batches, learner.loss)
    return next(iter(learner.model.layers.values())).rank, list(gradients.values())


def _exactly(gradients: list[Tensor], count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [spectral.leading_singular_vectors(G, count) for G in gradients]


def _directions(gradients: list[Tensor], count: int, steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    with patch.object(spectral, "_DIRECTION_STEPS", steps):
        return [spectral.leading_directions(G, count) for G in gradients]


def _overlap(found: Tensor, exact: Tensor) -> float:
    """The mean squared cosine between the columns of ``found`` and the space of ``exact``."""
    return float((found.double().mT @ exact).square().sum()) / exact.shape[1]
