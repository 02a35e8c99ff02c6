"""SmolLM2 in bfloat16, 8 and 4 bits compared with float32: memory, seconds per step, loss; a process each."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.memory import peak_anonymous
from benchmarks.rows import Row
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.modeling.precision import stored_bytes
from fedsmoothlora.runs.planning import build, plan

_OVERRIDES = {
    "partition.clients": 2,
    "training.rounds": 2,
    "training.steps": 4,
    "training.batch_size": 4,
    "evaluation.batch_size": 4,
    "data.test_rows": 16,
    "task.metric": None,
    "task.metric_rows": None,
    "task.metric_every": None,
    "task.max_new_tokens": None,
    "machine.threads": 1,
}
_SMALLEST = "NF4, activations computed again"
_HELD: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"model.dtype": "bfloat16"},
    "int8": {"model.quantization": "int8"},
    "NF4": {"model.quantization": "nf4"},
    _SMALLEST: {
        "model.quantization": "nf4",
        "training.gradient_checkpointing": True,
    },
}
# glibc keeps freed memory; blocks above this many bytes are returned to the system.
_GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "262144"}
_METRICS = {
    "weights": ("MB", 1e6),
    "peak anonymous memory, weights included": ("MB", 1e6),
    "training, a step of 4 rows": ("s", 1.0),
    "held-out loss before training": ("nats", 1.0),
    "held-out loss after 2 rounds": ("nats", 1.0),
}


class _Steps(Callback):
    """Processor seconds between steps of a client."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_client_begin(self, client: str, steps: int) -> None:
        self._last = None

    def on_client_step(self, client: str, loss: float) -> None:
        now = time.process_time()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


def rows() -> Iterator[Row]:
    """The recipe smollm2-asdiv with two clients, four steps of four rows each, two rounds; float32 first."""
    found = {held: _measured(held) for held in _HELD}
    exact = found.pop("float32")
    found[f"{_SMALLEST}, freed memory given back"] = _measured(_SMALLEST, _GIVEN_BACK)
    for held, metrics in found.items():
        for name, (unit, divisor) in _METRICS.items():
            yield Row(
                name=f"SmolLM2, {held}: {name}",
                value=metrics[name] / divisor,
                unit=unit,
                against=exact[name] / divisor,
            )


def _measured(held: str, environment: Mapping[str, str] = MappingProxyType({})) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.quantized", held],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **environment},
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(held: str) -> None:
    """Print the metrics of one weight format, without the report and the final model."""
    torch.set_num_threads(1)
    planned = plan(read("smollm2-asdiv", {**_OVERRIDES, **_HELD[held]}))
    losses: list[float] = []
    steps = _Steps()

    def train() -> None:
        losses.extend(record.value("loss") for record in run_rounds(build(planned), steps))

    with quiet_libraries():
        empty = planned.task_data.load(empty=True)
        peak = peak_anonymous(train)
    values = (
        stored_bytes(empty.model, planned.config.model, empty.head),
        peak,
        statistics.median(steps.seconds),
        losses[0],
        losses[-1],
    )
    print(json.dumps(dict(zip(_METRICS, values, strict=True))))


if __name__ == "__main__":
    main(sys.argv[1])
