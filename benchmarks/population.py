"""Rounds of a tiny model with 100 to 10,000 clients: memory, time and disk, each case in its own process."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from benchmarks.memory import peak_anonymous
from benchmarks.rows import Row, anonymous_bytes
from fedsmoothlora import Federation
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.federation.records import RoundRecord

_FEATURES, _CLASSES, _ROWS, _ROUNDS = 32, 4, 8, 6


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a run.

    Attributes:
        memory: the peak of anonymous memory of the process, imports included.
        seconds: processor time of a round, the median without the first.
        disk: bytes of the states of all clients that took part.
        seen: the number of these clients.
    """

    memory: int
    seconds: float
    disk: int
    seen: int


def rows() -> Iterator[Row]:
    """Costs by the number of clients, and by the number of those that take part in a round."""
    few, many = _measured(100, 100), _measured(10_000, 100)
    yield Row(
        name="100 of 10,000 clients a round, tiny model: anonymous memory, against 100 of 100",
        value=many.memory / 1e6,
        unit="MB",
        against=few.memory / 1e6,
        target="at most 1.1",
    )
    yield Row(
        name="100 of 10,000 clients a round, tiny model: seconds of a round, against 100 of 100",
        value=many.seconds,
        unit="s",
        against=few.seconds,
        target="about 1",
    )
    fewer = _measured(10_000, 25)
    yield Row(
        name="100 of 10,000 clients a round, tiny model: seconds of a round, against 25 of 10,000",
        value=many.seconds,
        unit="s",
        against=fewer.seconds,
        target="at most 4",
    )
    yield Row(
        name=f"disk of a client that took part: {many.seen} of 10,000 clients, against {fewer.seen}",
        value=many.disk / many.seen / 1e3,
        unit="kB",
        against=fewer.disk / fewer.seen / 1e3,
        target="about 1",
    )


class _Clock(Callback):
    """Processor time at the end of every round, and the clients that took part."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.clients: set[str] = set()

    def on_client_end(self, client: str) -> None:
        self.clients.add(client)

    def on_round_end(self, record: RoundRecord) -> None:
        self.times.append(time.process_time())


def federation(clients: int, participants: int) -> Federation:
    """A federation of clients with eight rows each, of one layer with LoRA and a head."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(_FEATURES, _FEATURES), nn.ReLU(), nn.Linear(_FEATURES, _CLASSES))
    inputs, labels = torch.randn(clients * _ROWS, _FEATURES), torch.arange(clients * _ROWS) % _CLASSES
    parts = zip(inputs.split(_ROWS), labels.split(_ROWS), strict=True)
    data: list[Dataset[tuple[Tensor, ...]]] = [TensorDataset(*part) for part in parts]
    return Federation(
        model,
        data,
        head=["2"],
        options={"calibration_batches": 1},
        test=data[0],
        lora={"r": 4, "alpha": 8, "target_modules": ["0"]},
        training={"rounds": _ROUNDS, "steps": 2, "batch_size": _ROWS, "lr": 0.01},
        participation={"clients": participants},
        machine={"threads": 1},
    )


def cost(clients: int, participants: int) -> Cost:
    """Run all rounds."""
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        before = anonymous_bytes()

        def run() -> None:
            federation(clients, participants).run(out, console=Console(quiet=True), callbacks=[clock])

        memory = before + peak_anonymous(run)
        disk = sum(path.stat().st_size for path in (out / "clients").rglob("*") if path.is_file())
    steps = [after - earlier for earlier, after in zip(clock.times[1:], clock.times[2:], strict=False)]
    return Cost(memory=memory, seconds=statistics.median(steps), disk=disk, seen=len(clock.clients))


def _measured(clients: int, participants: int) -> Cost:
    command = [sys.executable, "-m", "benchmarks.population", str(clients), str(participants)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    print(json.dumps(vars(cost(int(sys.argv[1]), int(sys.argv[2])))))
