"""The engine that trains several clients at once on this machine, each in a process forked from the run.

A forked process shares the memory of the run: pretrained weights, merged updates, data and the client's
message. Nothing has to be loaded, sent or synchronised, and only pages that the client writes to are copied,
such as the adapted weights. The client's state is stored on disk, as with one process, and the reply is
returned through a pipe.
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
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.engines.in_process import (
    InProcess,
    answered,
    personal_metrics,
    stopped_before,
    visit,
)
from fedsmoothlora.federation.engines.worker_process import Answer, WorkerProcess
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.payload import Payload
from fedsmoothlora.federation.serialization import flatten, serialised, unflatten
from fedsmoothlora.federation.simulation import ClientReply, Engine, MemoryStates, Simulation
from fedsmoothlora.federation.wire import pack, unpack
from fedsmoothlora.methods import Products
from fedsmoothlora.tasks.objectives.base import Evaluation

Found = TypeVar("Found")


def engine(jobs: int) -> Engine:
    """The engine that trains ``jobs`` clients at once on this machine."""
    return InProcess() if jobs == 1 else Processes(jobs)


def check(jobs: int, device: str) -> None:
    """Raise ``ConfigError`` if this machine and device cannot train ``jobs`` clients at once."""
    if jobs == 1:
        return
    if sys.platform != "linux":
        raise ConfigError(
            f"machine.jobs = {jobs}: several clients at once train in forked processes, which torch supports "
            "on Linux only; leave it at 1"
        )
    if device != "cpu" and torch.accelerator.is_available():
        raise ConfigError(
            f"machine.jobs = {jobs}: several clients at once train on the CPU, but machine.device = "
            f"{device!r} uses this machine's accelerator: set machine.device = 'cpu', or machine.jobs = 1"
        )


def notes(jobs: int, threads: int) -> list[str]:
    """Warnings to show before ``jobs`` clients train at once."""
    crowded = too_many_threads(threads, jobs, processors())
    return [f"machine.jobs: {crowded}; see machine.threads"] if jobs > 1 and crowded is not None else []


def processors() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def too_many_threads(threads: int, jobs: int, processors: int) -> str | None:
    """A warning if jobs times threads is more than the number of processors; otherwise None."""
    if threads * jobs <= processors:
        return None
    return (
        f"{jobs} jobs of {threads} threads are more than this machine's {processors} processors: "
        "they will slow each other"
    )


class Processes:
    """Trains several clients at once (`fedsmoothlora.federation.simulation.Engine`).

    Replies equal those of `InProcess` bit for bit: the same code runs on the same memory, with the same
    number of threads.

    Args:
        jobs: number of clients that train at once.
    """

    in_turn = False

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        # The data are already tokenised. Without this, tokenizers would print a warning in every process.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def train(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterator[ClientReply]:
        """Run ``jobs`` clients at a time."""

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
        """Compute the gradients of ``jobs`` clients at a time."""

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
        """Evaluate the model in its current state on the validation rows of ``jobs`` clients at a time."""

        def ask(client: str, message: None, callback: Callback) -> Answer:
            found = simulation.evaluate(simulation.validation[client])
            confusion = {} if found.confusion is None else {"confusion": found.confusion}
            return {"metrics": found.metrics, "weight": found.weight}, [serialised(confusion)[0]]

        def read(fields: Mapping[str, Any], files: Sequence[bytes]) -> Evaluation:
            return Evaluation(fields["metrics"], load(files[0]).get("confusion"), fields["weight"])

        clients = list(simulation.validation)
        # A round that was trained is always evaluated, as with one process.
        simulation = replace(simulation, should_stop=lambda: False)
        found = dict(self._each(simulation, clients, lambda client: None, callback, ask, read))
        return {client: found[client] for client in clients}

    def personal(
        self, simulation: Simulation, message: Callable[[str], Message], callback: Callback
    ) -> Mapping[str, Mapping[str, float]]:
        """Evaluate the personal models of ``jobs`` clients at a time."""

        def ask(client: str, message: Message, callback: Callback) -> Answer:
            return {"metrics": personal_metrics(simulation, client, message, callback)}, [serialised({})[0]]

        def read(fields: Mapping[str, Any], files: Sequence[bytes]) -> Mapping[str, float]:
            return dict(fields["metrics"])

        clients = list(simulation.validation)
        found = dict(self._each(simulation, clients, message, callback, ask, read))
        return {client: found[client] for client in clients if client in found}

    def _each(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Any],
        callback: Callback,
        ask: Callable[[str, Any, Callback], Answer],
        read: Callable[[Mapping[str, Any], Sequence[bytes]], Found],
    ) -> Iterator[tuple[str, Found]]:
        """The answers of clients as they finish, without those that diverge or have lost their state.

        Args:
            simulation: the federation.
            clients: the clients to ask.
            message: builds a client's message; called before its process starts.
            callback: notified of the events in all processes.
            ask: computes a client's answer; called in the client's process.
            read: converts the answer that the process sent.

        Raises:
            ClientProcessError: a process failed or died.
            InterruptedRunError: the run was asked to stop; clients that had started have finished.
            ValueError: clients' states are in memory, where other processes cannot store them.
        """
        if isinstance(simulation.states, MemoryStates):
            raise ValueError("clients in other processes must keep their states on disk: use StoredStates")
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
                    raise stopped_before(simulation, left[0])
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
    """The function that a client's process runs. Its answer has no files if the client is left out."""

    def work(callback: Callback) -> Answer:
        answer = answered(simulation, client, callback, lambda client: ask(client, message, callback))
        return answer or ({}, [])

    return work
