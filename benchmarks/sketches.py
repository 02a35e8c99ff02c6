"""Sketches of calibration gradients compared with the gradients: overlap, memory, time; and whole runs."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.rows import Row, interleaved
from fedsmoothlora.algebra.alignment import gradient_aligned
from fedsmoothlora.algebra.seeds import generator_for
from fedsmoothlora.algebra.sketches import Sketch, SketchSize
from fedsmoothlora.algebra.spectral import leading_singular_vectors
from fedsmoothlora.config import read
from fedsmoothlora.data.examples import Batch
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.runs.planning import build, plan
from fedsmoothlora.runs.session import run
from fedsmoothlora.training.calibration import calibration_gradients, calibration_sketches

_RANKS = (2, 16)
_BATCHES, _BATCH_SIZE, _TIMED_BATCHES, _REPETITIONS = 8, 16, 2, 3
# Passes and width over r, as in the options.
_MODES = {
    "2 passes, 4r": (2, 4),
    "2 passes, 8r (default)": (2, 8),
    "3 passes, 4r": (3, 4),
    "1 pass, 8r + 2 and 16r + 3": (1, 8),
}
_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class _Client:
    """The first client of the recipe quickstart at 112 pixels (65 tokens per image), before round 0."""

    learner: Learner
    batches: list[Batch]

    @classmethod
    def of(cls, rank: int) -> _Client:
        changes = {"model.image_size": 112, "lora.r": rank, "machine.threads": torch.get_num_threads()}
        simulation = build(plan(read("quickstart", changes)))
        learner = simulation.learner
        learner.model.load_head(learner.initial_state.head)
        rows = next(iter(simulation.clients.values()))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        cut = [order[k * _BATCH_SIZE : (k + 1) * _BATCH_SIZE] for k in range(_BATCHES)]
        return cls(learner, [rows.batch(some) for some in cut])

    def gradients(self, count: int) -> dict[str, Tensor]:
        model = self.learner.model
        with model.without_lora():
            return calibration_gradients(model.model, model.modules, self.batches[:count], self.learner.loss)

    def sketched(self, sketches: Mapping[str, Sketch], count: int) -> None:
        model = self.learner.model
        with model.without_lora():
            calibration_sketches(
                model.model, model.modules, sketches, lambda: self.batches[:count], self.learner.loss
            )

    def lora(self, count: int) -> None:
        """Forward and backward of LoRA, as in training."""
        model = self.learner.model
        model.train_only(("B", "A"))
        model.model.train()
        for batch in self.batches[:count]:
            self.learner.loss(batch).backward()
            model.model.zero_grad(set_to_none=True)


def rows() -> Iterator[Row]:
    """The packaged ViT-S on handwritten digits: q, k and v of all blocks, eight batches of 16."""
    for rank in _RANKS:
        client = _Client.of(rank)
        gradients = client.gradients(_BATCHES)
        vectors = {name: leading_singular_vectors(G, 2 * rank) for name, G in gradients.items()}
        for mode in _MODES:
            yield from _overlaps(gradients, vectors, rank, mode)
        yield from _costs(client, gradients, rank)


def _sizes(gradients: Mapping[str, Tensor], rank: int, mode: str) -> dict[str, SketchSize]:
    passes, width = _MODES[mode]
    return {name: SketchSize.of(*G.shape, rank, width=width, passes=passes) for name, G in gradients.items()}


def _overlaps(
    gradients: Mapping[str, Tensor],
    vectors: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    rank: int,
    mode: str,
) -> Iterator[Row]:
    """Mean squared cosines with the exact vectors, mean over the layers.

    The other order, whose last pass is ``G^T U``, is the sketch of the transposed gradient.
    """
    found: dict[str, list[float]] = {}
    for name, size in _sizes(gradients, rank, mode).items():
        P, _, Q = vectors[name]
        for order, G in (("", gradients[name]), (", other side last", gradients[name].mT)):
            turned = SketchSize.of(*G.shape, rank, width=_MODES[mode][1], passes=size.passes)
            sketch = Sketch(turned, generator_for("sketch", name))
            while sketch.passes_left:
                sketch.add(torch.eye(G.shape[0]), G)
                sketch.turn()
            p, _, q = sketch.leading_singular_vectors(2 * rank)
            if order:
                p, q = q, p
            for which, got, exact in (
                ("P[:, r:2r]", p[:, rank:], P[:, rank:]),
                ("Q[:, :r]", q[:, :rank], Q[:, :rank]),
            ):
                cosines = float((got.mT @ exact).square().sum() / rank)
                found.setdefault(f"overlap of {which}{order}", []).append(cosines)
    for what, values in found.items():
        yield Row(name=f"r = {rank}, {mode}: {what}", value=statistics.mean(values), unit="", against=1.0)


def _costs(client: _Client, gradients: Mapping[str, Tensor], rank: int) -> Iterator[Row]:
    """Numbers in memory, and seconds including the subspaces."""
    for mode in _MODES:
        sizes = _sizes(gradients, rank, mode).values()
        yield Row(
            name=f"r = {rank}, {mode}: memory against the gradients'",
            value=sum(size.numbers for size in sizes) * 4 / 1e6,
            unit="MB",
            against=sum(G.nbytes for G in gradients.values()) / 1e6,
        )

    def exact() -> None:
        for G in client.gradients(_TIMED_BATCHES).values():
            gradient_aligned(G, rank, 512.0)

    def sketch(mode: str) -> None:
        sketches = {
            name: Sketch(size, generator_for("sketch", name))
            for name, size in _sizes(gradients, rank, mode).items()
        }
        client.sketched(sketches, _TIMED_BATCHES)
        for one in sketches.values():
            gradient_aligned(one, rank, 512.0)

    calls: dict[str, Callable[[], object]] = {"exact": exact, "lora": lambda: client.lora(_TIMED_BATCHES)}
    calls |= {mode: lambda mode=mode: sketch(mode) for mode in _MODES}  # type: ignore[misc]
    times = interleaved(calls, _REPETITIONS)
    yield Row(
        name=f"r = {rank}, gradients: calibration and subspaces against LoRA forward and backward",
        value=times["exact"],
        unit="s",
        against=times["lora"],
    )
    for mode, (passes, _) in _MODES.items():
        yield Row(
            name=f"r = {rank}, {mode}: one pass, its share of the subspaces included, against LoRA's",
            value=times[mode] / passes,
            unit="s",
            against=times["lora"],
            target="at most 1.1",
        )


def run_rows() -> Iterator[Row]:
    """The recipe quickstart, whole, with sketches (default mode) and with gradients."""
    accuracies: dict[str, list[float]] = {"exact": [], "sketch": []}
    for seed in _SEEDS:
        for gradient, found in accuracies.items():
            found.append(_accuracy({"seed": seed, "method.gradient": gradient}))
        yield Row(
            name=f"quickstart, whole, seed {seed}: accuracy with sketches",
            value=accuracies["sketch"][-1],
            unit="",
            against=accuracies["exact"][-1],
        )
    differences = [s - e for s, e in zip(accuracies["sketch"], accuracies["exact"], strict=True)]
    yield Row(
        name="quickstart: mean difference, without its sign, against the standard deviation over seeds",
        value=abs(statistics.mean(differences)),
        unit="",
        against=statistics.stdev(accuracies["exact"]),
        target="under 1",
    )


def _accuracy(changes: dict[str, Any]) -> float:
    changes["machine.threads"] = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        result = run("quickstart", changes, out=f"{folder}/run", console=Console(quiet=True))
        return result.values("accuracy")[-1]
