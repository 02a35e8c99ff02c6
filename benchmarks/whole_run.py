"""What a run spends on other things than rounds: evaluation and checkpoints."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console

from benchmarks.rows import Row
from fedsmoothlora.running import run
from fedsmoothlora.state import Checkpoints, StoredStates

_ROUNDS = 3


def rows() -> Iterator[Row]:
    """Three rounds of the recipe quickstart; the evaluation before the first counts too."""
    spent = 0.0

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def save(*arguments: Any) -> Any:
            nonlocal spent
            began = time.perf_counter()
            try:
                return original(*arguments)
            finally:
                spent += time.perf_counter() - began

        return save

    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(Checkpoints, "save", timed(Checkpoints.save)),
        patch.object(StoredStates, "save", timed(StoredStates.save)),
    ):
        result = run(
            "quickstart",
            {"training.rounds": _ROUNDS, "machine.threads": torch.get_num_threads()},
            out=f"{folder}/run",
            console=Console(quiet=True),
        )
        evaluation = sum(result.values("seconds_evaluation"))
        total = sum(result.values("seconds_round")) + evaluation + spent
    yield Row(
        name="quickstart: evaluation and checkpoints, of the rounds' time",
        value=evaluation + spent,
        unit="s",
        against=total,
        target="under 0.15",
    )
    yield Row(
        name="quickstart: checkpoints and client states alone",
        value=spent,
        unit="s",
        against=total,
    )
