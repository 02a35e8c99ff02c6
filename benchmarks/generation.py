"""Exact match of generated answers against the forward passes alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.rows import Row, seconds
from fedsmoothlora.config import read
from fedsmoothlora.runs.planning import build, plan
from fedsmoothlora.training.loop import to_device

_ROWS = 200


def rows() -> Iterator[Row]:
    """The recipe smollm2-asdiv before training: 200 rows, batches of 32, at most 16 new tokens."""
    changes = {
        "data.test_rows": _ROWS,
        "task.metric_rows": _ROWS,
        "machine.threads": torch.get_num_threads(),
    }
    simulation = build(plan(read("smollm2-asdiv", changes)))
    measurement, learner = simulation.measurement, simulation.learner
    assert measurement is not None
    model, accelerator = learner.model.model, learner.accelerator
    passes = _ForwardPasses(model)
    with learner.model.without_lora():
        whole = seconds(lambda: measurement.take(model, lambda batch: to_device(batch, accelerator)))
    yield Row(
        name=f"SmolLM2-135M: exact match of {_ROWS} rows, against its {passes.count} forward passes",
        value=whole,
        unit="s",
        against=passes.seconds,
        target="at most 1.2",
    )


class _ForwardPasses:
    """Processor seconds of a model's forward passes, and their number."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds, self.count, self._began = 0.0, 0, 0.0
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def _begin(self, *arguments: Any) -> None:
        self._began = time.process_time()

    def _end(self, *arguments: Any) -> None:
        self.seconds += time.process_time() - self._began
        self.count += 1
