"""Several clients in one forward pass, compared with one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.rows import Row, seconds, timed
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.data.examples import Subset
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.runs.planning import build, plan
from fedsmoothlora.training.lockstep import Lockstep

_CLIENTS = 5
_REPETITIONS = 3
_CHANGES = {
    "partition": {"kind": "iid", "clients": _CLIENTS},
    "training.epochs": None,
    "training.steps": 6,
    "training.batch_size": 8,
    "training.rounds": _REPETITIONS + 1,
}
_TITLE = f"ViT-S, 28 pixels, {_CLIENTS} clients of 8 rows in one forward pass"


def rows() -> Iterator[Row]:
    """Rounds of the recipe quickstart after the first; clients match from the second round on."""
    (together, trained_together), (alone, trained_alone) = _measured(_CLIENTS), _measured(1)
    steps = _CLIENTS * _CHANGES["training.steps"]  # type: ignore[operator]
    yield Row(
        name=f"{_TITLE}: local training against one client after the other",
        value=steps / trained_together,
        unit="steps/s",
        against=steps / trained_alone,
        target="at least 1.5",
    )
    yield Row(name=f"{_TITLE}: a round, with starts and uploads", value=together, unit="s", against=alone)


def _measured(together: int) -> tuple[float, float]:
    """Median processor seconds of a round without evaluation, and of its local training."""
    overrides: dict[str, Any] = {**_CHANGES, "machine.batch_clients": together}
    simulation = build(plan(read("quickstart", overrides)))
    assert simulation.test is not None
    simulation.test = Subset(simulation.test, np.arange(8))  # evaluations are not measured here
    spent = {"training": 0.0, "evaluation": 0.0}
    simulation.evaluate = timed(simulation.evaluate, spent, "evaluation")  # type: ignore[method-assign]
    whole, training = [], []
    with (
        patch.object(Learner, "_train", timed(Learner._train, spent, "training")),
        patch.object(Lockstep, "train", timed(Lockstep.train, spent, "training")),
    ):
        rounds = run_rounds(simulation, Callback())
        next(rounds)
        for _ in range(_REPETITIONS):
            spent |= {"training": 0.0, "evaluation": 0.0}
            whole.append(seconds(lambda: next(rounds)) - spent["evaluation"])
            training.append(spent["training"])
    return statistics.median(whole), statistics.median(training)
