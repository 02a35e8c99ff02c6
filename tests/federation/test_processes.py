"""Several clients at once give the same bits as one after the other, and leave no process behind."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from families import level
from fedsmoothlora import Federation, methods
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ClientProcessError, ConfigError, DivergedError, InterruptedRunError
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.engines import processes
from fedsmoothlora.federation.engines.in_process import InProcess
from fedsmoothlora.federation.engines.worker_process import WorkerProcess
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.federation.round_metrics import personal_at_end
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.serialization import flatten
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run
from fedsmoothlora.storage.client_store import StoredStates

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="clients at once are forked processes"),
]

SHORT = {"training.rounds": 2, "training.steps": 2, "partition.clients": 4, "participation.clients": 3}
CASES: dict[str, Mapping[str, Any]] = {
    **{name: {"method.name": name} for name in methods.names() if name != "fedsmoothlora"},
    "fedsmoothlora": {},
    "feedback": {"method.zeta": 0.0, "method.server_feedback": True},
    "shared gradients": {"method.gradient_aligned": "shared"},
    "shuffled gradients": {"method.gradient_aligned": "shuffled"},
    "start from the weights": {"method.gradient_aligned": "weight"},
    "ranks": {"method.name": "flexlora", "lora.client_ranks": "halving"},
    "scaffold": {"method.name": "fedit", "training.scaffold": True, "training.momentum": 0.0},
    "clients' own metrics": {"data.validation": 0.3, "evaluation.clients": True},
    "no test set": {"data.validation": 0.3, "evaluation.test": False},
    "no test set, no global model": {
        "method.name": "fedsa",
        "data.validation": 0.3,
        "evaluation.test": False,
    },
    "head": {"model.head": "full"},
    "personal models": {"data.validation": 0.3, "personal.ditto": 0.1, "evaluation.personal_steps": 2},
}


class Listener(Callback):
    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.notes: list[str] = []

    def on_client_begin(self, client: str, steps: int) -> None:
        self.told.append(("begins", client, steps))

    def on_client_step(self, client: str, loss: float) -> None:
        self.told.append(("step", client, loss))

    def on_client_end(self, client: str) -> None:
        self.told.append(("ends", client))

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def metrics(records: Sequence[RoundRecord]) -> list[Any]:
    """All metrics but times, in their order, and confusions."""
    return [
        (
            record.round,
            [(f.client, f.name, f.value) for f in record.metrics if not f.name.startswith("seconds")],
            None if record.confusion is None else record.confusion.tolist(),
        )
        for record in records
    ]


def outcome(simulation: Simulation, folder: Path, callback: Callback | None = None) -> tuple[Any, Any, Any]:
    """Metrics, server updates and LoRA, and all client states on disk."""
    simulation.states = StoredStates(folder, "0" * 32)
    records = list(run_rounds(simulation, callback or Callback()))
    records.append(personal_at_end(simulation, callback or Callback()))
    server = simulation.server
    kept = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    tensors = [flatten(update) for update in (*server.updates, server.model, server.memory, server.head)]
    return (
        metrics(records),
        [{name: value.numpy().tobytes() for name, value in part.items()} for part in tensors],
        kept,
    )


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process ids of all clients' processes so far."""
    ids: list[int] = []
    begin = WorkerProcess.begin

    def begun(*arguments: Any) -> WorkerProcess:
        made = begin(*arguments)
        assert made.process.pid is not None
        ids.append(made.process.pid)
        return made

    monkeypatch.setattr(WorkerProcess, "begin", begun)
    return ids


def gone(process: int) -> bool:
    """Whether a process ended and was waited for."""
    return not Path(f"/proc/{process}").exists()


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=level(c) if c in methods.names() else []) for c in CASES]
)
def test_the_number_of_jobs_changes_no_bit(
    case: str, toy_federation: Callable[..., Simulation], tmp_path: Path, spied: list[int]
) -> None:
    overrides = {**SHORT, "partition": {"kind": "iid", "clients": 4}, "evaluation.diagnostics": True}
    overrides = {**overrides, "training.max_grad_norm": None, **CASES[case]}
    overrides.pop("partition.clients")
    one = toy_federation(overrides)
    assert isinstance(one.engine, InProcess)
    expected = outcome(one, tmp_path / "one")
    assert not spied
    many = toy_federation({**overrides, "machine.jobs": 3})
    found = outcome(many, tmp_path / "many")
    assert len(spied) >= 6
    assert os.getpid() not in spied
    assert all(map(gone, spied))
    for part, other in zip(found, expected, strict=True):
        assert part == other


@pytest.mark.parametrize("source", ["tiny_gpt2", "tiny_llama"])
def test_the_number_of_jobs_changes_no_bit_of_language_models(
    source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{a} + {b} =", "answer": str(a + b)} for a in range(6) for b in range(4)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {
        "name": "sums",
        "model": {"source": str(request.getfixturevalue(source))},
        "task": {"kind": "causal-lm", "max_length": 64},
        "lora": {"r": 2, "target_modules": ["all-linear"]},
        "data": {"source": str(data), "validation": 0.25},
        "partition": {"kind": "iid", "clients": 3},
        "method": {"name": "fedsmoothlora", "gradient_aligned": "shared"},
        "training": {"rounds": 2, "steps": 2, "batch_size": 4, "lr": 0.02},
        "machine": {"threads": 1, "device": "cpu"},
    }
    found = []
    for jobs in (1, 2):
        result = run(table, {"machine.jobs": jobs}, out=tmp_path / str(jobs), console=quiet(), outputs=False)
        found.append([line for line in result.metrics if not line["name"].startswith("seconds")])
    assert found[0] == found[1]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=300)


def test_the_number_of_jobs_changes_no_bit_with_several_threads(
    toy_federation: Callable[..., Simulation], tmp_path: Path, spied: list[int]
) -> None:
    # OpenMP's pool of this process is in use by then, which a forked one must not wait for.
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wide = torch.randn(600, 600)
        assert torch.isfinite(wide @ wide).all()
        shorter = {**SHORT, "training.rounds": 1, "training.steps": 1, "method.calibration_batches": 1}
        expected = outcome(toy_federation(shorter), tmp_path / "one")
        assert outcome(toy_federation({**shorter, "machine.jobs": 2}), tmp_path / "two") == expected
    finally:
        torch.set_num_threads(threads)
    assert all(map(gone, spied))


def test_callbacks_are_notified_of_everything_that_happens_to_clients(
    toy_federation: Callable[..., Simulation], tmp_path: Path
) -> None:
    told = []
    for jobs in (1, 2):
        listener = Listener()
        outcome(toy_federation({**SHORT, "machine.jobs": jobs}), tmp_path / str(jobs), listener)
        told.append(listener.told)
    clients = {event[1] for event in told[0]}
    assert len(clients) == 4
    for client in clients:
        mine = [[event for event in one if event[1] == client] for one in told]
        assert mine[0] == mine[1]
    assert told[0] != told[1]  # two took turns


def failing_visit(
    monkeypatch: pytest.MonkeyPatch, fails: Callable[[str, Message], object], *, before: bool = False
) -> None:
    """Call ``fails`` in the visits of clients, after their training or before it."""
    visit = Learner.visit

    def visited(self: Learner, client: str, data: Any, message: Message, *rest: Any) -> Any:
        if before:
            fails(client, message)
        done = visit(self, client, data, message, *rest)
        if not before:
            fails(client, message)
        return done

    monkeypatch.setattr(Learner, "visit", visited)


def test_clients_that_diverge_are_left_out_with_the_same_note(
    toy_federation: Callable[..., Simulation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(client: str, message: Message) -> None:
        if client in ("0", "2") and message.round == 1:
            raise DivergedError("the loss is nan at step 1")

    failing_visit(monkeypatch, diverges)
    overrides = {**SHORT, "participation.clients": 4, "evaluation.diagnostics": True}
    found = []
    for jobs in (1, 2):
        listener = Listener()
        simulation = toy_federation({**overrides, "machine.jobs": jobs})
        found.append((outcome(simulation, tmp_path / str(jobs), listener), sorted(listener.notes)))
    assert found[0] == found[1]
    assert "client 0 diverged in round 2 and is left out: the loss is nan at step 1" in found[0][1]


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (lambda client, message: os.kill(os.getpid(), signal.SIGKILL), r"was ended by SIGKILL before.*jobs"),
        (lambda client, message: os._exit(3), r"ended with code 3 before it had answered"),
        (lambda client, message: {}["none"], r"^client 1: KeyError: 'none'$"),
    ],
)
def test_a_process_that_dies_or_fails_ends_the_run_and_names_the_client(
    fails: Callable[[str, Message], object],
    reason: str,
    toy_federation: Callable[..., Simulation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spied: list[int],
) -> None:
    def one_fails(client: str, message: Message) -> None:
        if client == "1":
            fails(client, message)
        elif client == "0":
            time.sleep(60)  # is not waited for

    failing_visit(monkeypatch, one_fails, before=True)
    simulation = toy_federation({**SHORT, "participation.clients": 4, "machine.jobs": 2})
    began = time.monotonic()
    with pytest.raises(ClientProcessError, match=f"client 1: .*{reason}|{reason}"):
        outcome(simulation, tmp_path / "states")
    assert time.monotonic() - began < 30
    assert len(spied) == 2
    assert all(map(gone, spied))


def test_a_process_that_dies_within_a_message_is_reported_too() -> None:
    def work(callback: Callback) -> Any:
        os.write(callback._connection.fileno(), struct.pack("!i", 100) + b"only a part")  # type: ignore[attr-defined]
        os._exit(4)

    begun = WorkerProcess.begin("a", work, [])
    with pytest.raises(ClientProcessError, match="client a: its process ended with code 4"):
        begun.receive(Callback())
    begun.end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_run_lets_the_current_client_finish(number: int) -> None:
    """A batch system sends SIGTERM to every process, a terminal Ctrl-C."""

    def work(callback: Callback) -> tuple[dict[str, Any], list[bytes]]:
        os.kill(os.getpid(), number)
        time.sleep(0.05)
        return {"done": True}, []

    begun = WorkerProcess.begin("a", work, [])
    assert begun.receive(Callback()) == ({"done": True}, [])
    begun.close()


def test_an_error_of_starting_a_process_names_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", none)
    with pytest.raises(ClientProcessError, match="client a: cannot start a process: Resource temp"):
        WorkerProcess.begin("a", lambda callback: ({}, []), [])


def test_machines_that_cannot_train_several_clients_at_once_are_refused_before_loading(
    toy_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert plan(read(toy_table, {"machine.jobs": 2, "machine.device": "cpu"}))
    assert plan(read(toy_table, {"machine.jobs": 1, "machine.device": "auto"}))
    with pytest.raises(ConfigError, match=r"machine\.jobs = 2: .* set machine\.device = 'cpu'"):
        plan(read(toy_table, {"machine.jobs": 2, "machine.device": "auto"}))
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"machine\.jobs = 2: .* on Linux only"):
        plan(read(toy_table, {"machine.jobs": 2}))


def test_more_threads_than_processors_are_noted(
    toy_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "processors", lambda: 3)
    for jobs, threads, noted in ((1, 4, False), (3, 1, False), (2, 2, True)):
        notes = plan(read(toy_table, {"machine.jobs": jobs, "machine.threads": threads})).notes
        assert any(f"{jobs} jobs of {threads} threads are more than" in note for note in notes) == noted


def test_states_in_memory_are_refused(toy_federation: Callable[..., Simulation]) -> None:
    with pytest.raises(ValueError, match="keep their states on disk"):
        list(run_rounds(toy_federation({**SHORT, "machine.jobs": 2, "data.validation": 0.2}), Callback()))


def test_a_run_whose_client_died_is_resumed_where_it_was(
    toy_table: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {**toy_table, "machine": {"threads": 1, "device": "cpu", "jobs": 2}}

    def dies(client: str, message: Message) -> None:
        if message.round == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        failing_visit(patch, dies)
        console = quiet()
        with pytest.raises(ClientProcessError):
            run(table, out=tmp_path / "killed", console=console, outputs=False)
    assert "to go on: fedsmoothlora run --resume" in console.file.getvalue()  # type: ignore[attr-defined]
    # With another number of clients at once, which is no other mathematics.
    resumed = run(None, {"machine.jobs": 1}, resume=tmp_path / "killed", console=quiet(), outputs=False)
    whole = run(table, {"machine.jobs": 3}, out=tmp_path / "whole", console=quiet(), outputs=False)

    def values(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [line for line in metrics if not line["name"].startswith("seconds")]

    assert values(resumed.metrics) == values(whole.metrics)
    with pytest.raises(ConfigError, match=r"machine\.threads differs"):
        run(None, {"machine.threads": 2}, resume=tmp_path / "killed", console=quiet())


def test_a_stop_waits_for_current_clients_and_starts_no_other(
    toy_federation: Callable[..., Simulation], tmp_path: Path, spied: list[int]
) -> None:
    simulation = toy_federation({**SHORT, "participation.clients": 4, "machine.jobs": 2})
    simulation.should_stop = lambda: len(spied) == 2
    listener = Listener()
    with pytest.raises(InterruptedRunError, match="stopped in round 1, before client 2"):
        outcome(simulation, tmp_path / "states", listener)
    assert [event[:2] for event in sorted(listener.told) if event[0] == "ends"] == [
        ("ends", "0"),
        ("ends", "1"),
    ]
    assert all(map(gone, spied))


def test_a_trained_round_is_evaluated_even_if_a_stop_was_requested(
    toy_federation: Callable[..., Simulation], tmp_path: Path, spied: list[int]
) -> None:
    overrides = {**SHORT, "participation.clients": 2, "data.validation": 0.3, "machine.jobs": 2}
    simulation = toy_federation(overrides)
    simulation.states = StoredStates(tmp_path / "states", "")
    rounds = run_rounds(simulation, Callback())
    next(rounds)
    spied.clear()
    simulation.should_stop = lambda: len(spied) >= 2
    assert next(rounds).value("accuracy") is not None
    with pytest.raises(InterruptedRunError, match="stopped in round 2"):
        next(rounds)


def test_replies_that_are_no_longer_read_leave_no_process(
    toy_federation: Callable[..., Simulation],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spied: list[int],
) -> None:
    failing_visit(monkeypatch, lambda client, message: time.sleep(60) if client == "1" else None)
    simulation = toy_federation({**SHORT, "machine.jobs": 2})
    simulation.states = StoredStates(tmp_path / "states", "")
    replies = simulation.engine.train(simulation, ["0", "1", "2"], simulation.server.message, Callback())
    assert next(iter(replies)).client == "0"
    assert len(spied) == 2
    replies.close()  # type: ignore[attr-defined]
    assert all(map(gone, spied))


def test_processes_end_when_their_parent_is_killed(
    toy_federation: Callable[..., Simulation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def waits(client: str, message: Message) -> None:
        (tmp_path / f"{os.getpid()}.pid").touch()
        time.sleep(60)

    failing_visit(monkeypatch, waits, before=True)
    simulation = toy_federation({**SHORT, "machine.jobs": 2})
    # In a thread, as the engine does it: the forking one would wait for the OpenMP pool of earlier tests.
    work = threading.Thread(target=outcome, args=(simulation, tmp_path / "states"))
    parent = os.fork()
    if parent == 0:
        work.start()
        work.join()
        os._exit(0)
    try:
        waited(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
    waited(lambda: not any(running(int(path.stem)) for path in tmp_path.glob("*.pid")))


def running(process: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def waited(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_federation_of_ones_own_model_and_data_trains_several_clients_at_once(
    tmp_path: Path, spied: list[int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [[(torch.randn(6, generator=generator), row % 3) for row in range(12)] for client in range(3)]
    found = []
    for jobs in (1, 2):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        federation = Federation(
            model,
            data,
            test=data[0],
            options={"gamma": 64, "calibration_batches": 1},
            lora={"r": 1, "target_modules": ["0"]},
            head=["2"],
            training={"rounds": 2, "batch_size": 4, "lr": 0.05},
            machine={"threads": 1, "device": "cpu", "jobs": jobs},
        )
        result = federation.run(tmp_path / str(jobs), console=quiet())
        weights = {name: value.numpy().tobytes() for name, value in federation.model().state_dict().items()}
        values = [line for line in result.metrics if not line["name"].startswith("seconds")]
        found.append((values, weights))
    assert found[0] == found[1]
    assert len(spied) == 6
    assert all(map(gone, spied))
