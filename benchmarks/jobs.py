"""Several clients at a time: rounds by the clock, and the memory of all processes of a run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from benchmarks.rows import Row
from fedsmoothlora.runs.session import run

_ROUNDS = 2  # the first finds neither the kernels' caches nor the data's pages warm, and is not counted
_REPETITIONS = 1
# An even number of clients, so that two at a time never leave one over.
_OVERRIDES = {
    "partition": {"kind": "iid", "clients": 4},
    "training.rounds": _ROUNDS,
    "training.epochs": None,
    "training.steps": 6,
}
_CASES: Mapping[str, Mapping[str, int]] = {
    "one client at a time, 1 thread": {"machine.jobs": 1, "machine.threads": 1},
    "one client at a time, 2 threads": {"machine.jobs": 1, "machine.threads": 2},
    "two clients at once, 1 thread each": {"machine.jobs": 2, "machine.threads": 1},
}


def rows() -> Iterator[Row]:
    """The recipe quickstart with four clients of six steps: on two processors, used in several ways."""
    found: dict[str, list[tuple[float, float, str]]] = {case: [] for case in _CASES}
    for _ in range(_REPETITIONS):
        for case, measured in found.items():
            measured.append(_measured(case))
    same = {metrics for case in (_ONE, _TWO) for _, _, metrics in found[case]}
    assert len(same) == 1, "the number of jobs changed a result"
    seconds = {case: median(one[0] for one in measured) for case, measured in found.items()}
    memory = {case: median(one[1] for one in measured) for case, measured in found.items()}
    for other in (_ONE, _THREADS):
        yield Row(
            name=f"a round of 4 clients, {_TWO}: against {other}",
            value=seconds[_TWO],
            unit="s",
            against=seconds[other],
        )
    yield Row(
        name=f"anonymous memory of all processes, {_TWO}: against {_ONE}",
        value=memory[_TWO] / 1e6,
        unit="MB",
        against=memory[_ONE] / 1e6,
    )


_ONE, _THREADS, _TWO = _CASES


def _measured(case: str) -> tuple[float, float, str]:
    """Seconds of a round, peak memory, and all metrics, of a run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.jobs", case]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    seconds, memory, metrics = done.stdout.splitlines()[-1].split("\t")
    return float(seconds), float(memory), metrics


def anonymous_of_all() -> int:
    """Bytes of anonymous memory of this process and its children; a shared page counts once.

    The sum of Pss_Anon, in which each of the n processes that share a page counts one n-th of it.
    """
    own = os.getpid()
    children = [
        int(one) for path in Path(f"/proc/{own}/task").glob("*/children") for one in path.read_text().split()
    ]
    total = 0
    for process in (own, *children):
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")) * 1024
    return total


def main(case: str) -> None:
    """Print the cost of one case."""
    peak = before = anonymous_of_all()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_of_all())
            time.sleep(0.1)

    callback = threading.Thread(target=watch)
    callback.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = run(
                "quickstart",
                {**_OVERRIDES, **_CASES[case]},
                out=f"{folder}/run",
                console=Console(quiet=True),
                outputs=False,
            )
    finally:
        done.set()
        callback.join()
    seconds = median(result.values("seconds_round")[1:])
    metrics = [line["value"] for line in result.metrics if not line["name"].startswith("seconds")]
    print(seconds, peak - before, metrics, sep="\t")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
