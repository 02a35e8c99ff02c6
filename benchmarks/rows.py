"""A measured value with its reference, and functions that measure both."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the benchmark.

    Attributes:
        name: the measured quantity and its reference.
        value: the value of this package.
        unit: of ``value`` and ``against``.
        against: the reference, measured in the same process.
        target: the desired ratio.
    """

    name: str
    value: float
    unit: str
    against: float
    target: str = ""

    @property
    def ratio(self) -> float:
        """``value / against``."""
        return self.value / self.against

    def json(self) -> str:
        """The row as one line of JSON."""
        fields = asdict(self)
        target = fields.pop("target")
        return json.dumps({**fields, "ratio": self.ratio, "target": target})


def seconds(call: Callable[[], object]) -> float:
    """Processor seconds of one call in this process; other processes disturb them little."""
    began = time.process_time()
    call()
    return time.process_time() - began


def interleaved(calls: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median processor seconds of each call; every repetition calls each once, in turn.

    Each is called once before without measurement.
    """
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            found[name].append(seconds(call))
    return {name: statistics.median(times) for name, times in found.items()}


def peak_allocated(call: Callable[[], object]) -> int:
    """Peak bytes of tensors that ``call`` allocated, including workspaces and results."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    peak = held = 0
    for _, nbytes in changes:
        held += nbytes
        peak = max(peak, held)
    return peak


def anonymous_bytes() -> int:
    """This process's RssAnon: memory without a file behind it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def timed(function: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """The function, whose processor seconds are added to ``spent[name]``."""

    def call(*arguments: Any, **named: Any) -> Any:
        began = time.process_time()
        try:
            return function(*arguments, **named)
        finally:
            spent[name] += time.process_time() - began

    return call
