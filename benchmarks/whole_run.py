"""The time of the parts of a run, each without the parts inside it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from benchmarks.rows import Row
from fedsmoothlora.algebra import alignment
from fedsmoothlora.data.examples import Subset
from fedsmoothlora.federation import client
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.server import Server
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA
from fedsmoothlora.modeling.backbone import MergedBackbone
from fedsmoothlora.runs.session import run
from fedsmoothlora.storage.checkpoints import Checkpoints
from fedsmoothlora.storage.client_store import StoredStates
from fedsmoothlora.training import loop

_ROUNDS = 3
_FLOOR = ("training: forward and backward", "calibration: forward and backward")
_SAVING = "checkpoints and client states"

# By part: the functions that do it, as owner and name. Whatever else runs is "all else".
_PARTS: dict[str, list[tuple[Any, str]]] = {
    _FLOOR[0]: [(loop, "_backward")],
    "training: optimiser and bookkeeping": [(client, "train")],
    _FLOOR[1]: [(client, "calibration_gradients")],
    "starts: singular vectors": [(alignment, "leading_directions")],
    "starts: matching, truncation, figures": [(FedSmoothLoRA, "start")],
    "weights written": [(MergedBackbone, "set_shift")],
    "uploads": [(FedSmoothLoRA, "upload")],
    "messages and replies": [(Learner, "visit")],
    "average and merge": [(Server, "aggregate"), (MergedBackbone, "merge")],
    "rows made into batches": [(Subset, "batch")],
    "evaluation": [(Simulation, "evaluate")],
    _SAVING: [(Checkpoints, "save"), (StoredStates, "save")],
}


class OwnTimes:
    """Seconds by the clock of nested parts, each without the parts inside it.

    Attributes:
        seconds: by part.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside as ``name``, except for parts inside it."""
        self._settle()
        self._open.append(name)
        try:
            yield
        finally:
            self._settle()
            self._open.pop()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed as ``name``."""

        def call(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*arguments, **named)

        return call

    def _settle(self) -> None:
        now = time.perf_counter()
        if self._open:
            inner = self._open[-1]
            self.seconds[inner] = self.seconds.get(inner, 0.0) + now - self._since
        self._since = now


def rows() -> Iterator[Row]:
    """Three rounds of the recipe quickstart; including the evaluation before the first."""
    times = OwnTimes()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        for name, functions in _PARTS.items():
            for owner, function in functions:
                whole = times.around(name, getattr(owner, function))
                patches.enter_context(patch.object(owner, function, whole))
        with times.part("all else"):
            result = run(
                "quickstart",
                {"training.rounds": _ROUNDS, "machine.threads": torch.get_num_threads()},
                out=f"{folder}/run",
                console=Console(quiet=True),
            )
    assert len(result.values("seconds_round")) == _ROUNDS
    found = times.seconds
    # The model's loading and the run's report happen once, whatever the number of rounds.
    total = sum(seconds for name, seconds in found.items() if name != "all else")
    title = f"quickstart, {_ROUNDS} rounds"
    for name in sorted(found, key=lambda name: -found[name]):
        if name != "all else":
            yield Row(name=f"{title}: {name}", value=found[name], unit="s", against=total)
    yield Row(
        name=f"{title}: all but evaluation and checkpoints, against forward and backward alone",
        value=total - found["evaluation"] - found[_SAVING],
        unit="s",
        against=sum(found[name] for name in _FLOOR),
    )
    yield Row(
        name=f"{title}: evaluation and checkpoints",
        value=found["evaluation"] + found[_SAVING],
        unit="s",
        against=total,
        target="under 0.15",
    )
