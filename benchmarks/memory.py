"""Peak anonymous memory of whole runs compared with one client's plain LoRA training, a process each."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console

from benchmarks.rows import Row, anonymous_bytes
from benchmarks.training import bare_loop
from fedsmoothlora.config import read
from fedsmoothlora.runs.planning import build, plan
from fedsmoothlora.runs.session import run

_OVERRIDES = {
    "partition": {"kind": "iid", "clients": 5},
    "training.epochs": None,
    "training.steps": 2,
    "training.rounds": 2,
    "training.batch_size": 8,
    "evaluation.batch_size": 8,
    "machine.threads": 1,
}
_CASES = {
    "5 clients": _OVERRIDES,
    "500 clients, 20 a round": {
        **_OVERRIDES,
        "partition": {"kind": "iid", "clients": 500},
        "participation.clients": 20,
    },
}


def rows() -> Iterator[Row]:
    """The packaged ViT-S, 28 pixels, batches of 8, so that weights need more memory than activations."""
    plain = _measured("plain")
    for case in _CASES:
        yield Row(
            name=f"ViT-S, {case}: anonymous memory of a run against plain LoRA training of one client",
            value=_measured(case) / 1e6,
            unit="MB",
            against=plain / 1e6,
            target="at most 1.15",
        )


def _measured(case: str) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", case]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return int(done.stdout.split()[-1])


def peak_anonymous(call: Callable[[], object]) -> int:
    """The peak RssAnon while ``call`` runs minus the value before, sampled every 5 ms."""
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.005)

    callback = threading.Thread(target=watch)
    callback.start()
    try:
        call()
    finally:
        done.set()
        callback.join()
    return peak - before


def _plain() -> None:
    """One client's training by PEFT alone; the model is copied from its mapped file into memory."""
    planned = plan(read("quickstart", _OVERRIDES))
    simulation = build(planned)
    data, size = next(iter(simulation.clients.values())), planned.config.training.batch_size
    del simulation
    batches = (data.batch(range(step * size, (step + 1) * size)) for step in range(4))
    bare_loop(planned, mapped=False)([batches])


def main(case: str) -> None:
    """Print the peak of one case."""
    torch.set_num_threads(1)
    if case == "plain":
        print(peak_anonymous(_plain))
        return
    with tempfile.TemporaryDirectory() as folder:
        quiet = Console(quiet=True)
        print(peak_anonymous(lambda: run("quickstart", _CASES[case], out=f"{folder}/run", console=quiet)))


if __name__ == "__main__":
    main(sys.argv[1])
