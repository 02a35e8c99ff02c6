"""Several clients at once on this machine, each visit in a process of its own that is forked off this one.

Such a process has everything that this one has in memory, at the same pages: pretrained weights, merged
updates, data, the client's message. So there is nothing to load, to send down or to keep in step, and a page
is copied only where the visit writes to it: the adapted weights, and what training allocates. The client's
state goes to disk as in one process; the reply comes back through a pipe.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load
from torch import Tensor

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import ConfigError, InterruptedRunError
from fedsmoothlora.federation.engines.in_process import InProcess, answered, visit
from fedsmoothlora.federation.engines.worker_process import Answer, WorkerProcess
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.serialization import flatten, serialised, unflatten
from fedsmoothlora.federation.simulation import ClientReply, Engine, MemoryStates, Simulation
from fedsmoothlora.federation.wire import Payload, pack, unpack
from fedsmoothlora.methods import Products
from fedsmoothlora.tasks.objectives.base import Evaluation

Found = TypeVar("Found")


def engine(jobs: int) -> Engine:
    """The engine that trains so many clients at once on this machine."""
    return InProcess() if jobs == 1 else Processes(jobs)


def check(jobs: int, device: str) -> None:
    """Raise ``ConfigError`` where so many clients at once cannot be had, on this machine and this device."""
    if jobs == 1:
        return
    if sys.platform != "linux":
        raise ConfigError(
            f"machine.jobs = {jobs}: clients at once are forked processes, which torch bears on Linux only; "
            "leave it at 1"
        )
    if device != "cpu" and torch.accelerator.is_available():
        raise ConfigError(
            f"machine.jobs = {jobs}: clients at once train on processors, and machine.device = {device!r} "
            "takes this machine's accelerator: set machine.device = 'cpu', or leave machine.jobs at 1"
        )


def notes(jobs: int, threads: int) -> list[str]:
    """Warnings to show before ``jobs`` clients train at once."""
    crowded = too_many_threads(threads, jobs, processors())
    return [f"machine.jobs: {crowded}; see machine.threads"] if jobs > 1 and crowded is not None else []


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def too_many_threads(threads: int, jobs: int, processors: int) -> str | None:
    """A sentence where jobs and threads are more than there are processors."""
    if threads * jobs <= processors:
        return None
    return (
        f"{jobs} jobs of {threads} threads are more than this machine's {processors} processors: "
        "they will slow each other"
    )


class Processes:
    """The engine for several clients at once; `fedsmoothlora.federation.simulation.Engine` says what it does.

    Replies are bit for bit those of `InProcess`: the same code runs on the same memory, with as many threads.

    Args:
        jobs: how many clients at once.
    """

    in_turn = False

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        # The data are tokens by now. Unless told, tokenizers would print a warning in every process.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def train(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterator[ClientReply]:
        """Visit ``jobs`` clients at a time."""

        def ask(client: str, message: Message, callback: Callback) -> Answer:
            visited = visit(simulation, client, message, callback)
            payload = pack(visited.reply)
            return payload.fields, [payload.tensors, serialised(flatten(visited.start))[0]]

        def read(fields: Mapping[str, Any], files: Sequence[bytes]) -> tuple[Reply, Products]:
            tensors, start = files
            return unpack(Reply, Payload(tensors, fields)), cast(Products, unflatten(load(start)))

        for client, (reply, start) in self._each(simulation, clients, message, callback, ask, read):
            yield ClientReply(client=client, reply=reply, start=start)

    def calibrate(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Ask ``jobs`` clients at a time for their gradients."""

        def ask(client: str, message: Message, callback: Callback) -> Answer:
            state = simulation.states.load(client, callback)
            gradients = simulation.learner.calibrate(
                client, simulation.clients[client], message, state, callback
            )
            return {}, [serialised(gradients)[0]]

        def read(fields: Mapping[str, Any], files: Sequence[bytes]) -> Mapping[str, Tensor]:
            return load(files[0])

        yield from self._each(simulation, clients, message, callback, ask, read)

    def validate(
        self, simulation: Simulation, message: Callable[[str], Message], callback: Callback
    ) -> Mapping[str, Evaluation]:
        """Measure the model as it stands on the validation rows of ``jobs`` clients at a time."""

        def ask(client: str, message: None, callback: Callback) -> Answer:
            found = simulation.evaluate(simulation.validation[client])
            confusion = {} if found.confusion is None else {"confusion": found.confusion}
            return {"metrics": found.metrics, "weight": found.weight}, [serialised(confusion)[0]]

        def read(fields: Mapping[str, Any], files: Sequence[bytes]) -> Evaluation:
            return Evaluation(fields["metrics"], load(files[0]).get("confusion"), fields["weight"])

        clients = list(simulation.validation)
        # A round that is trained is measured too, as in one process.
        simulation = replace(simulation, should_stop=lambda: False)
        found = dict(self._each(simulation, clients, lambda client: None, callback, ask, read))
        return {client: found[client] for client in clients}

    def _each(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Any],
        callback: Callback,
        ask: Callable[[str, Any, Callback], Answer],
        read: Callable[[Mapping[str, Any], Sequence[bytes]], Found],
    ) -> Iterator[tuple[str, Found]]:
        """The answers of clients as they finish, without those that diverge or lost state that they need.

        Args:
            simulation: whose clients they are.
            clients: who is asked.
            message: makes what a client is asked with, right before its process begins.
            callback: notified of the events in all processes.
            ask: asks a client; called in that client's process.
            read: makes the answer of what that process said.

        Raises:
            ClientProcessError: a process failed or died.
            InterruptedRunError: someone asked the run to stop; the clients in hand have finished.
            ValueError: clients' states are in memory, where processes cannot keep them.
        """
        if isinstance(simulation.states, MemoryStates):
            raise ValueError("clients in processes of their own keep their states on disk: use StoredStates")
        t = simulation.server.round
        left = deque(clients)
        at_work: dict[Connection, WorkerProcess] = {}
        try:
            while left or at_work:
                while left and len(at_work) < self.jobs and not simulation.should_stop():
                    client = left.popleft()
                    work = _work(simulation, client, message(client), ask)
                    begun = WorkerProcess.begin(client, work, at_work)
                    at_work[begun.connection] = begun
                if not at_work:
                    raise InterruptedRunError(f"stopped in round {t + 1}, before client {left[0]}")
                for connection in wait(list(at_work)):
                    one = at_work[cast(Connection, connection)]
                    answer = one.receive(callback)
                    if answer is None:
                        continue
                    del at_work[one.connection]
                    one.close()
                    fields, files = answer
                    if files:
                        yield one.client, read(fields, files)
        finally:
            for one in at_work.values():
                one.end()
                callback.on_client_end(one.client)


def _work(
    simulation: Simulation, client: str, message: Any, ask: Callable[[str, Any, Callback], Answer]
) -> Callable[[Callback], Answer]:
    """The work of a client's process: its answer, without files if the client is left out."""

    def work(callback: Callback) -> Answer:
        answer = answered(simulation, client, callback, lambda client: ask(client, message, callback))
        return answer or ({}, [])

    return work
