"""The time of the parts of a run's rounds, each without the parts inside it, so that they add up."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from benchmarks.rows import Row
from fedsmoothlora.algebra import alignment
from fedsmoothlora.algebra.diagnostics import StartDiagnosis
from fedsmoothlora.data.examples import Subset
from fedsmoothlora.federation import client, client_views, rounds
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.probe import Probe
from fedsmoothlora.federation.server import Server
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA
from fedsmoothlora.modeling.backbone import MergedBackbone
from fedsmoothlora.runs.session import Session, run
from fedsmoothlora.storage.checkpoints import Checkpoints
from fedsmoothlora.storage.client_store import StoredStates
from fedsmoothlora.storage.replies import StoredReplies
from fedsmoothlora.storage.run_folder import RunFolder
from fedsmoothlora.training import loop

_ROUNDS = 3
_FLOOR = ("training: forward and backward", "calibration: forward and backward")
_SAVING = "checkpoints and client states"
_FILES = "files of replies and metrics"
_REST = "all else: drawing clients, console, trackers"

# By part: the functions that do it, as owner and name. Whatever else happens in rounds is `_REST`.
_PARTS: dict[str, list[tuple[Any, str]]] = {
    _FLOOR[0]: [(loop, "_backward")],
    "training: optimiser and bookkeeping": [(client, "train")],
    _FLOOR[1]: [(client_views, "calibration_gradients")],
    "starts: singular vectors": [(alignment, "leading_directions")],
    "starts: matching, truncation": [(FedSmoothLoRA, "start")],
    "diagnosis of starts and rounds": [
        (StartDiagnosis, "add"),
        (StartDiagnosis, "metrics"),
        (Probe, "at_start"),
        (Probe, "mean_loss"),
        (rounds, "diagnosis"),
        (rounds, "metrics_of_round"),
    ],
    "weights written": [(MergedBackbone, "set_shift")],
    "uploads": [(FedSmoothLoRA, "upload")],
    "messages and replies": [(Learner, "visit"), (Server, "message")],
    "checks of replies": [(rounds, "check_replies")],
    "average and merge": [(Server, "aggregate"), (MergedBackbone, "merge")],
    "rows made into batches": [(Subset, "batch")],
    "evaluation": [(Simulation, "evaluate")],
    _SAVING: [(Checkpoints, "save"), (StoredStates, "save"), (StoredStates, "load")],
    _FILES: [
        (rounds, "memmapped_reply"),
        (StoredReplies, "keep"),
        (StoredReplies, "load"),
        (StoredReplies, "clear"),
        (RunFolder, "append_metrics"),
        (RunFolder, "write_confusion"),
    ],
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
        """``function``, timed as ``name`` where it is called inside another part."""

        def call(*arguments: Any, **named: Any) -> Any:
            if not self._open:
                return function(*arguments, **named)
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
    """Three rounds of the recipe quickstart, with diagnostics; including the evaluation before the first."""
    times = OwnTimes()
    trained = Session._train
    whole = 0.0

    def train(session: Session, *arguments: Any) -> None:
        nonlocal whole
        began = time.perf_counter()
        with times.part(_REST):
            trained(session, *arguments)
        whole += time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        for name, functions in _PARTS.items():
            for owner, function in functions:
                timed = times.around(name, getattr(owner, function))
                patches.enter_context(patch.object(owner, function, timed))
        patches.enter_context(patch.object(Session, "_train", train))
        result = run(
            "quickstart",
            {
                "training.rounds": _ROUNDS,
                "evaluation.diagnostics": True,
                "machine.threads": torch.get_num_threads(),
            },
            out=f"{folder}/run",
            console=Console(quiet=True),
        )
    assert len(result.values("seconds_round")) == _ROUNDS
    yield from rows_of(times.seconds, whole)


def rows_of(found: Mapping[str, float], whole: float) -> Iterator[Row]:
    """The parts by size, their sum, and the ratios that have a target.

    Args:
        found: seconds by part.
        whole: seconds of all rounds by one clock around them.
    """
    title = f"quickstart, {_ROUNDS} rounds"
    for name in sorted(found, key=lambda name: -found[name]):
        yield Row(name=f"{title}: {name}", value=found[name], unit="s", against=whole)
    total = sum(found.values())
    yield Row(name=f"{title}: the sum of the parts", value=total, unit="s", against=whole, target="1")
    saving = found[_SAVING] + found[_FILES]
    yield Row(
        name=f"{title}: all but evaluation and files, against forward and backward alone",
        value=total - found["evaluation"] - saving,
        unit="s",
        against=sum(found[name] for name in _FLOOR),
    )
    yield Row(
        name=f"{title}: evaluation and files",
        value=found["evaluation"] + saving,
        unit="s",
        against=whole,
        target="under 0.15",
    )
