"""A measured figure beside what it is compared with, and how both are measured."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the benchmark.

    Attributes:
        name: what was measured, and against what.
        value: this package's figure.
        unit: of ``value`` and ``against``.
        against: the figure it is compared with, measured in the same process.
        target: what the ratio should be.
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
        """One JSON object on one line."""
        fields = asdict(self)
        target = fields.pop("target")
        return json.dumps({**fields, "ratio": self.ratio, "target": target})


def seconds(call: Callable[[], object]) -> float:
    """Processor seconds that one call takes in this process, by which other processes count little."""
    began = time.process_time()
    call()
    return time.process_time() - began


def interleaved(calls: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median processor seconds of each call; in every repetition each is called once, in turn.

    Each is called once before, unmeasured.
    """
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            found[name].append(seconds(call))
    return {name: statistics.median(times) for name, times in found.items()}


def peak_allocated(call: Callable[[], object]) -> int:
    """Most bytes of tensors alive at one moment that ``call`` allocated, workspaces and results included."""
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
    """This process's RssAnon: memory that no file backs."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024
