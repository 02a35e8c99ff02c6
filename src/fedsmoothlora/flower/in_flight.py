"""The sites that train in asynchronous rounds, with the real times at which their uploads arrive."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from flwr.app import MessageType, RecordDict

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import InterruptedRunError
from fedsmoothlora.federation.arrivals import Event
from fedsmoothlora.federation.asynchronous import Draw
from fedsmoothlora.federation.messages import Message, memmapped_reply
from fedsmoothlora.federation.simulation import ClientReply, Simulation
from fedsmoothlora.federation.staleness import InFlight
from fedsmoothlora.federation.wire import pack
from fedsmoothlora.flower.received import no_reply_reason, reply_of, status_or_failed
from fedsmoothlora.flower.records import to_records

POLL = 0.5  # seconds between looks for replies


class Messenger(Protocol):
    """Sends messages to nodes (`fedsmoothlora.flower.coordinator.FlowerEngine`)."""

    def nodes_of(self, clients: Sequence[str], callback: Callback) -> Mapping[str, int]: ...
    def send(self, kind: str, node: int, content: RecordDict, timeout: float) -> str | None: ...
    def replies(self, identities: Sequence[str]) -> Iterator[tuple[str, RecordDict | None]]: ...


class SitesInFlight:
    """Sites that train at the same time (`fedsmoothlora.federation.asynchronous.Traffic`).

    A site that does not reply within ``flower.timeout``, or whose process or node ends, makes room for
    another one. After a resume, the sites that were in flight count as failed: their replies went to the
    coordinator that was stopped.

    Args:
        messenger: sends messages to nodes.
        simulation: the federation.
        callback: notified of every step.
        timeout: seconds after which a site counts as failed.
    """

    simulated = False

    def __init__(
        self, messenger: Messenger, simulation: Simulation, callback: Callback, timeout: float
    ) -> None:
        self._messenger, self._simulation, self._callback = messenger, simulation, callback
        self._timeout = timeout
        restored = simulation.server.in_flight
        self._zero = time.monotonic() - restored.time
        self.time = restored.time
        self.began = {client: began for _, client, began in restored.clients}
        self._finished = deque(client for _, client, _ in restored.clients)
        self._waiting: dict[str, tuple[str, float]] = {}  # by id of the message: the client, its deadline
        self._answers: dict[str, ClientReply] = {}

    def next(self, draw: Draw) -> Sequence[Event]:
        """New sites where there is room, otherwise the site that finishes next.

        Raises ``InterruptedRunError`` if the run is asked to stop.
        """
        simulation = self._simulation
        free = simulation.participation.count(len(simulation.clients)) - len(self.began)
        if free > 0 and (clients := draw(free)):
            self.time = self._now()
            return [Event("begin", client, self.time) for client in clients]
        while not self._finished:
            if not self._waiting:
                return []
            if simulation.should_stop():
                raise InterruptedRunError("stopped while waiting for clients")
            self._look()
            if not self._finished:
                time.sleep(POLL)
        client = self._finished.popleft()
        self.time = self._now()
        return [Event("arrive" if client in self._answers else "fail", client, self.time)]

    def begin(self, round: int, clients: Sequence[str], message: Callable[[str], Message]) -> None:
        """Send the sites their messages."""
        nodes = self._messenger.nodes_of(clients, self._callback)
        for client in clients:
            self.began[client] = round
            identity = None
            if client in nodes:
                content = to_records(pack(message(client)))
                identity = self._messenger.send(MessageType.TRAIN, nodes[client], content, self._timeout)
            if identity is None:
                self._note(client, "is not connected and is left out")
                self._finished.append(client)
            else:
                self._waiting[identity] = client, time.monotonic() + self._timeout

    def end(self, client: str) -> ClientReply | None:
        """The reply of a site that has finished; None if it has none."""
        del self.began[client]
        return self._answers.pop(client, None)

    def in_flight(self) -> InFlight:
        """The sites that train now."""
        return InFlight(self.time, tuple((self.time, client, t) for client, t in self.began.items()))

    def end_round(self, round: int, merged: Sequence[tuple[str, int]]) -> None:
        """Nothing is to be done."""

    def _now(self) -> float:
        return time.monotonic() - self._zero

    def _look(self) -> None:
        """Read the replies that have arrived, and give up sites that are late."""
        for identity, content in self._messenger.replies(list(self._waiting)):
            client, _ = self._waiting.pop(identity)
            self._receive(client, content)
            self._finished.append(client)
        for identity, (client, deadline) in list(self._waiting.items()):
            if time.monotonic() > deadline:
                self._note(client, f"did not reply within {self._timeout:g} s (flower.timeout)")
                del self._waiting[identity]
                self._finished.append(client)

    def _receive(self, client: str, content: RecordDict | None) -> None:
        self._callback.on_client_end(client)
        status = status_or_failed(content)
        if content is not None and status == "done":
            answer = reply_of(client, content, self._round, self._callback)
            if answer is not None:
                reply = memmapped_reply(answer.reply)
                self._answers[client] = ClientReply(client=client, reply=reply)
            return
        if status == "behind":  # its next message brings all updates
            self._simulation.server.received.pop(client, None)
        self._note(client, no_reply_reason(content))

    @property
    def _round(self) -> str:
        return f"round {self._simulation.server.round + 1}"

    def _note(self, client: str, text: str) -> None:
        self._callback.on_note(f"{self._round}: client {client} {text}")
