"""The server's cost of a round with 1,000 clients, of which 25, 50 or 100 take part; each in its own process.

The clients' replies are made up: everything else is the real thing, from the messages to the merged update.
Time is that of a tiny model, four square layers of 64; memory that of four of 512, where layers outweigh what
Python holds: at rank 8 a hundred uploads of a layer are three times the dense layer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.memory import peak_anonymous
from benchmarks.rows import Row
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.data.own import OwnExamples
from fedsmoothlora.federation import rounds
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.engines.in_process import InProcess
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.server import Server
from fedsmoothlora.federation.settings import ParticipationSettings
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.modeling.settings import LoraSettings
from fedsmoothlora.storage.checkpoints import StoredUpdates
from fedsmoothlora.tasks.objectives import Classification
from fedsmoothlora.training.settings import TrainingSettings

_CLIENTS, _PARTICIPANTS, _ROUNDS = 1000, (25, 50, 100), 9
_LAYERS, _TINY, _WIDE, _RANK = 4, 64, 512, 8
_DENSE = 4 * _WIDE * _WIDE


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The server's cost, the largest of all rounds.

    Attributes:
        seconds: processor time of a round, the median, without the time in which the engine made the replies.
        checking: bytes of anonymous memory beyond what there was before, while uploads were checked.
        averaging: the same, while they were averaged and the update was made.
        waiting: bytes of the files in which the replies waited, and the sums for clients that missed rounds.
        counted: bytes of the replies, as counted.
    """

    seconds: float
    checking: int
    averaging: int
    waiting: int
    counted: int


def rows() -> Iterator[Row]:
    """Time, memory and disk by the number of participants."""
    costs = {participants: _measured(participants) for participants in _PARTICIPANTS}
    few, most = costs[_PARTICIPANTS[0]], costs[_PARTICIPANTS[-1]]
    for participants in _PARTICIPANTS[1:]:
        yield Row(
            name=f"{_CLIENTS} clients, tiny model, a round's server time: {participants} participants "
            f"against {_PARTICIPANTS[0]}",
            value=costs[participants].seconds,
            unit="s",
            against=few.seconds,
            target=f"at most {participants // _PARTICIPANTS[0]}",
        )
    for what, memory in (("checking", most.checking), ("averaging", most.averaging)):
        yield Row(
            name=f"{_PARTICIPANTS[-1]} participants, anonymous memory of {what}: against one dense layer",
            value=memory / 1e6,
            unit="MB",
            against=_DENSE / 1e6,
        )
    yield Row(
        name=f"anonymous memory of averaging: {_PARTICIPANTS[-1]} participants against {_PARTICIPANTS[-2]}",
        value=most.averaging / 1e6,
        unit="MB",
        against=costs[_PARTICIPANTS[-2]].averaging / 1e6,
        target="about 1: as many uploads again, no more memory",
    )
    yield Row(
        name=f"{_PARTICIPANTS[-1]} participants, files: replies and sums of updates, against the replies",
        value=most.waiting / 1e6,
        unit="MB",
        against=most.counted / 1e6,
    )
    yield Row(
        name=f"the same files: {_PARTICIPANTS[-1]} participants against {_PARTICIPANTS[0]}",
        value=most.waiting / 1e6,
        unit="MB",
        against=few.waiting / 1e6,
        target=f"at most {_PARTICIPANTS[-1] // _PARTICIPANTS[0]}",
    )


class MadeUp(InProcess):
    """Clients that send random factors; ``seconds`` is the processor time of creating them."""

    seconds = 0.0

    def train(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterator[tuple[str, Reply]]:
        """The server creates every message; the made-up replies do not depend on it."""
        for client in clients:
            asked = message(client)
            began = time.process_time()
            draw = torch.Generator().manual_seed(1000 * asked.round + int(client))
            reply = Reply(
                client=client,
                round=asked.round,
                attempt=asked.attempt,
                samples=1 + int(client) % 7,
                sent={
                    name: LowRank(
                        torch.randn(layer.m, layer.rank, generator=draw),
                        torch.randn(layer.rank, layer.n, generator=draw),
                    )
                    for name, layer in simulation.server.layers.items()
                },
                metrics={"train_loss": 1.0},
            )
            self.seconds += time.process_time() - began
            yield client, reply


def federation(participants: int, width: int, updates: Path) -> Simulation:
    """A thousand clients without data, ready for round 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(width, width, bias=False) for _ in range(_LAYERS)]
        model = nn.Sequential(*layers, nn.Linear(width, 2))
        data = OwnExamples(TensorDataset(torch.randn(8, width), torch.randint(2, (8,))), "test")
    accelerator = Accelerator(cpu=True)
    settings = LoraSettings(r=_RANK, alpha=2 * _RANK, target_modules=tuple(map(str, range(_LAYERS))))
    adapted = AdaptedModel(model, settings, head=(), head_is_trained_whole=False)
    origin = InitialState(adapted.layers, 0, adapted.backbone.pretrained)
    method = read({"name": "x", "model": {"source": "x"}, "data": {"source": "x"}}).method
    return Simulation(
        engine=MadeUp(),
        server=Server(
            method=method,
            layers=adapted.layers,
            initial_state=origin,
            rounds=_ROUNDS,
            head={},
            population=_CLIENTS,
            updates=StoredUpdates(updates),
        ),
        learner=Learner(
            model=adapted,
            method=method,
            objective=Classification(),
            training=TrainingSettings(rounds=_ROUNDS, steps=1),
            accelerator=accelerator,
            initial_state=origin,
        ),
        clients={str(client): data for client in range(_CLIENTS)},
        test=data,
        evaluation_batch_size=8,
        participation=ParticipationSettings(clients=participants),
    )


def cost(participants: int) -> Cost:
    """Run the rounds twice: the tiny model for time, the wide one for memory."""
    with tempfile.TemporaryDirectory() as folder:
        simulation = federation(participants, _TINY, Path(folder) / "tiny")
        engine, seconds = simulation.engine, []
        assert isinstance(engine, MadeUp)
        records = rounds.run_rounds(simulation, Callback())
        next(records)  # the evaluation before the first round
        for _ in range(_ROUNDS):
            began, made_up = time.process_time(), engine.seconds
            next(records)
            seconds.append(time.process_time() - began - (engine.seconds - made_up))
        seconds.sort()
        watched = _watched(federation(participants, _WIDE, Path(folder) / "wide"))
    return replace(watched, seconds=seconds[len(seconds) // 2])


def _watched(simulation: Simulation) -> Cost:
    """The memory of checking and averaging the replies, and the disk space of waiting replies."""
    most = {"checking": 0, "averaging": 0, "waiting": 0, "counted": 0}
    check_replies, aggregate, before = rounds.check_replies, simulation.server.aggregate, _mapped_files()

    def watching(what: str, call: Callable[..., object]) -> Callable[..., object]:
        def watch(replies: Sequence[Reply], *rest: object) -> object:
            found: list[object] = []
            most["waiting"] = max(most["waiting"], _mapped_files() - before)
            most["counted"] = max(most["counted"], sum(reply.nbytes for reply in replies))
            peak = peak_anonymous(lambda: found.append(call(replies, *rest)))
            most[what] = max(most[what], peak)
            return found[0]

        return watch

    with (
        patch.object(rounds, "check_replies", watching("checking", check_replies)),
        patch.object(simulation.server, "aggregate", watching("averaging", aggregate)),
    ):
        for _ in rounds.run_rounds(simulation, Callback()):
            pass
    return Cost(seconds=0.0, **most)


def _mapped_files() -> int:
    """Bytes of this package's temporary files that this process maps; they no longer have a name."""
    total = 0
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        span, *_, path = line.split(maxsplit=5) if len(line.split()) > 5 else (line.split()[0], "")
        if "fedsmoothlora-" in path:
            begin, end = (int(address, 16) for address in span.split("-"))
            total += end - begin
    return total


def _measured(participants: int) -> Cost:
    command = [
        sys.executable,
        "-m",
        "benchmarks.many_clients",
        str(participants),
        str(torch.get_num_threads()),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def main(participants: str, threads: str) -> None:
    """Print the cost of one number of participants."""
    torch.set_num_threads(int(threads))
    print(json.dumps(vars(cost(int(participants)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
