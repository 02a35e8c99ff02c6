"""The effect of bfloat16 factors on accuracy: short quickstarts with the same seeds in both formats."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.rows import Row
from fedsmoothlora.runs.result import Result
from fedsmoothlora.runs.session import run

_SEEDS = (0, 1, 2)
_ROUNDS = 2


def rows() -> Iterator[Row]:
    """Accuracy and loss by seed, and the mean difference in accuracy compared with the spread over seeds."""
    found: dict[str, list[float]] = {"bfloat16": [], "float32": []}
    for seed in _SEEDS:
        results = {dtype: _run(seed, dtype) for dtype in found}
        for dtype, accuracies in found.items():
            accuracies.append(results[dtype].accuracy)
        for metric, unit in (("accuracy", "of rows"), ("loss", "nats")):
            coded, plain = (results[dtype].values(metric)[-1] for dtype in found)
            yield Row(
                name=f"quickstart, {_ROUNDS} rounds, seed {seed}: {metric}, bfloat16 against float32 factors",
                value=coded,
                unit=unit,
                against=plain,
            )
    differences = [coded - plain for coded, plain in zip(*found.values(), strict=True)]
    yield Row(
        name="the same: mean difference, without its sign, against the standard deviation over seeds",
        value=abs(statistics.mean(differences)),
        unit="of rows",
        against=statistics.stdev(found["float32"]),
        target="at most 1",
    )


def _run(seed: int, dtype: str) -> Result:
    """A short quickstart; its metrics are the global model's."""
    overrides = {
        "seed": seed,
        "transport.bits": {"float32": 32, "bfloat16": 16}[dtype],
        "training.rounds": _ROUNDS,
        "machine.threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        return run("quickstart", overrides, out=Path(folder) / "run", console=Console(quiet=True))
