"""Asynchronous rounds (FedBuff, arXiv 2106.06639): a round ends as soon as ``K`` uploads are there.

Up to ``M`` clients train at the same time (``participation.clients``). A client that finishes makes room for
another one, which begins with the newest model. As soon as ``K`` uploads are there
(``participation.buffer``), the server merges them and the next round begins, while the other clients train
on. An upload that began ``k`` rounds ago has staleness ``k``, and its change counts with the weight ``w(k)``
(`fedsmoothlora.federation.staleness`).

Three rules make synchronous rounds the special case in which ``K = M`` clients need the same time. Uploads
that arrive at the same moment arrive in the order of client ids. Nobody begins before all uploads of a moment
have arrived, and the rounds that they end are over. A client whose upload waits in the buffer does not begin
again before that upload was merged, so every client has at most one upload under way.

`Traffic` decides what happens next: `Simulated` by a virtual clock, `Replayed` by the record of another run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, takewhile
from typing import Protocol, runtime_checkable

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import StateError
from fedsmoothlora.federation.answers import answers, fewest, size, too_few
from fedsmoothlora.federation.arrivals import Event, RoundArrivals
from fedsmoothlora.federation.messages import Message, Reply, memmapped_reply
from fedsmoothlora.federation.participation import client_speeds, sample_clients
from fedsmoothlora.federation.records import Metric
from fedsmoothlora.federation.round_metrics import metrics_of_round
from fedsmoothlora.federation.simulation import ClientReply, Simulation
from fedsmoothlora.federation.staleness import InFlight
from fedsmoothlora.federation.uploads import check_replies
from fedsmoothlora.methods import Products

Draw = Callable[[int], Sequence[str]]


class Traffic(Protocol):
    """The clients that train, and the order in which they begin and finish.

    Attributes:
        time: the time of the last event.
        began: by client in flight, the round in which it began.
        simulated: whether times are simulated.
    """

    simulated: bool
    time: float
    began: dict[str, int]

    def next(self, draw: Draw) -> Sequence[Event]:
        """The next events: clients that begin, or one that finishes. Nothing if no client can do either.

        Args:
            draw: ``draw(count)`` are so many clients, or fewer, that may begin now.
        """
        ...

    def begin(self, round: int, clients: Sequence[str], message: Callable[[str], Message]) -> None:
        """Let clients begin, each with its message."""
        ...

    def end(self, client: str) -> ClientReply | None:
        """The reply of a client that has finished; None if it has none."""
        ...

    def in_flight(self) -> InFlight:
        """The clients that train now, for a checkpoint."""
        ...

    def end_round(self, round: int, merged: Sequence[tuple[str, int]]) -> None:
        """A round has ended with the uploads of these clients, each with the round in which it began."""
        ...


@runtime_checkable
class InRealTime(Protocol):
    """An engine whose clients are on other machines, so that they take the time that they take."""

    def traffic(self, simulation: Simulation, callback: Callback) -> Traffic:
        """The clients that train, in asynchronous rounds."""
        ...


class Simulated:
    """Clients with simulated speeds on a virtual clock (`Traffic`).

    A client needs ``steps / speed`` units of time for its local training. It is trained when it begins, while
    the model is the one that it begins from, and its reply waits until the time at which it finishes.

    Args:
        simulation: the federation. Clients that were in flight at its checkpoint are in flight again.
        callback: notified of every step.
    """

    simulated = True

    def __init__(self, simulation: Simulation, callback: Callback) -> None:
        self._simulation = simulation
        self._callback = callback
        self._speeds = client_speeds(
            simulation.participation.speeds,
            list(simulation.clients),
            simulation.learner.initial_state.seed,
        )
        self._answers: dict[str, ClientReply] = {}
        restored = simulation.server.in_flight
        self.time = restored.time
        self.began = {client: began for _, client, began in restored.clients}
        self._finish = {client: finish for finish, client, _ in restored.clients}
        self._queue = [(finish, client) for finish, client, _ in restored.clients]
        heapq.heapify(self._queue)
        for began in {*self.began.values()}:
            stored = simulation.replies.load(began, 0, callback.on_note)
            self._answers |= {client: stored[client] for client in stored if self.began.get(client) == began}

    def next(self, draw: Draw) -> Sequence[Event]:
        """New clients, once all uploads of this moment have arrived; otherwise the client that is next."""
        simulation = self._simulation
        free = simulation.participation.count(len(simulation.clients)) - len(self.began)
        at_this_moment = bool(self._queue) and self._queue[0][0] <= self.time
        if free > 0 and not at_this_moment and (clients := draw(free)):
            return [Event("begin", client, self.time) for client in clients]
        if not self._queue:
            return []
        self.time, client = heapq.heappop(self._queue)
        return [Event("arrive" if client in self._answers else "fail", client, self.time)]

    def begin(self, round: int, clients: Sequence[str], message: Callable[[str], Message]) -> None:
        """Train the clients, and note when they will have finished."""
        self._train(round, clients, message)
        for client in clients:
            self.began[client] = round
            self._finish[client] = self.time + self._duration(client)
            heapq.heappush(self._queue, (self._finish[client], client))

    def end(self, client: str) -> ClientReply | None:
        """The reply of a client that has finished; None if it diverged or its stored reply is lost."""
        del self.began[client], self._finish[client]
        return self._answers.pop(client, None)

    def in_flight(self) -> InFlight:
        """The clients that train now, with the times at which they will finish."""
        clients = sorted((self._finish[client], client, began) for client, began in self.began.items())
        return InFlight(self.time, tuple(clients))

    def end_round(self, round: int, merged: Sequence[tuple[str, int]]) -> None:
        """Nothing is to be done."""

    def _train(self, round: int, clients: Sequence[str], message: Callable[[str], Message]) -> None:
        for answer in answers(self._simulation, round, 0, clients, message, self._callback):
            self._answers[answer.client] = replace(answer, reply=memmapped_reply(answer.reply))

    def _duration(self, client: str) -> float:
        learner, rows = self._simulation.learner, len(self._simulation.clients[client])
        return learner.training.steps_for(rows, learner.method.calibration.batches) / self._speeds[client]


class Replayed(Simulated):
    """Clients that begin and finish in the order of a record (`Traffic`).

    Args:
        simulation: the federation.
        callback: notified of every step.
        rounds: the recorded rounds.
    """

    def __init__(self, simulation: Simulation, callback: Callback, rounds: Sequence[RoundArrivals]) -> None:
        super().__init__(simulation, callback)
        self._rounds = rounds
        self._left: list[Event] = []
        self._round = -1

    def next(self, draw: Draw) -> Sequence[Event]:
        """The next event of the recorded round, or all clients that begin next; none at the round's end.

        Raises ``StateError`` if the record does not fit what has happened.
        """
        if self._round != self._simulation.server.round:
            self._round = self._simulation.server.round
            self._left = list(self._rounds[self._round].events)
        found = list(takewhile(lambda event: event.kind == "begin", self._left)) or self._left[:1]
        training = {*self.began}
        for event in found:
            if (event.client in training) == (event.kind == "begin"):
                raise self._does_not_fit(f"{event.kind!r} of client {event.client} cannot happen next")
            training ^= {event.client}
            self.time = event.time
        del self._left[: len(found)]
        return found

    def begin(self, round: int, clients: Sequence[str], message: Callable[[str], Message]) -> None:
        """Train the clients whose uploads will arrive."""
        failing = [client for client in clients if self._fails(client, round)]
        for client in failing:
            message(client)  # counts its bytes
        self._train(round, [client for client in clients if client not in failing], message)
        for client in clients:
            self.began[client], self._finish[client] = round, self.time

    def end_round(self, round: int, merged: Sequence[tuple[str, int]]) -> None:
        """Compare the uploads that were merged with the record. Raises ``StateError`` if they differ."""
        if self._left or tuple(merged) != self._rounds[round].merged:
            recorded = ", ".join(client for client, _ in self._rounds[round].merged)
            raise self._does_not_fit(
                f"the recorded run merged the uploads of {recorded}, and this run those of "
                f"{', '.join(client for client, _ in merged)}"
            )

    def _fails(self, client: str, round: int) -> bool:
        """Whether the client that begins now ends without an upload."""
        later = chain(self._left, chain.from_iterable(one.events for one in self._rounds[round + 1 :]))
        return next((event.kind for event in later if event.client == client), "arrive") == "fail"

    def _does_not_fit(self, reason: str) -> StateError:
        return StateError(
            f"round {self._round + 1}: {reason}, so the record of participation.replay is that of a run with "
            "other settings, or it is damaged"
        )


def traffic(simulation: Simulation, callback: Callback) -> Traffic:
    """The traffic of a federation: a record's, that of an engine in real time, or a simulated one."""
    if simulation.replayed is not None:
        return Replayed(simulation, callback, simulation.replayed)
    if isinstance(simulation.engine, InRealTime):
        return simulation.engine.traffic(simulation, callback)
    if simulation.participation.replay is not None:
        raise ValueError("participation.replay is set, but the federation was built without its record")
    return Simulated(simulation, callback)


@dataclass(kw_only=True)
class AsynchronousUploads:
    """Collects the uploads of one round.

    Attributes:
        simulation: the federation.
        t: the round.
        callback: notified of every step.
        traffic: the clients that train, over all rounds.
        buffer: the uploads that have arrived, each with the round in which its client began.
        events: the events of the round.
        idle: clients that began in this round and failed, or whose upload was refused.
        draws: how often clients were drawn in the round.
        sent: size of all messages in bytes.
        received: size of all replies in bytes.
        refused: the number of refused replies.
        lost: the number of clients that failed, and of uploads that were dropped or refused.
        starts: always empty, because diagnostics are refused.
        total: None: the server reads every upload.
    """

    simulation: Simulation
    t: int
    callback: Callback
    traffic: Traffic
    buffer: dict[str, tuple[int, Reply]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    idle: set[str] = field(default_factory=set)
    draws: int = 0
    sent: int = 0
    received: int = 0
    refused: int = 0
    lost: int = 0
    starts: list[Products] = field(default_factory=list)
    total: None = None

    def collect(self) -> list[Reply]:
        """The accepted replies, ordered by client, as soon as ``participation.buffer`` of them are there.

        If no client is left that could fill the buffer, the round ends with the replies that are there.

        Raises ``FederationStoppedError`` if these are too few.
        """
        simulation, full = self.simulation, self.simulation.participation.merged(len(self.simulation.clients))
        self.callback.on_round_begin(self.t, simulation.server.rounds, full)
        wanted, _ = fewest(simulation)
        while True:
            ended = len(self.buffer) < full and not self._goes_on()
            if len(self.buffer) < full and not ended:
                continue
            accepted = self._check()
            if len(accepted) >= max(wanted, 1):
                break
            if ended:
                raise too_few(simulation, self.t, 1)
        if ended:
            self._note(f"{len(accepted)} uploads are merged, fewer than {full}: no other clients are left")
        simulation.server.in_flight = self.traffic.in_flight()
        merged = tuple((reply.client, reply.round) for reply in accepted)
        self.traffic.end_round(self.t, merged)
        simulation.arrivals.record(self.t, RoundArrivals(merged, tuple(self.events)))
        return accepted

    def metrics(self, accepted: Sequence[Reply]) -> list[Metric]:
        """The metrics of the accepted replies, and the round's numbers of clients and bytes."""
        staleness = [self.t - reply.round for reply in accepted]
        return [
            *metrics_of_round(
                accepted,
                left_out=self.lost,
                refused=self.refused,
                received=self.received,
                sent=self.sent,
            ),
            Metric(None, "staleness", sum(staleness) / len(staleness)),
            Metric(None, "staleness_max", max(staleness)),
            *([Metric(None, "simulated_time", self.traffic.time)] if self.traffic.simulated else []),
        ]

    def _goes_on(self) -> bool:
        """Let the next thing happen; False if nothing can."""
        events = self.traffic.next(self._draw)
        self.events += events
        beginning = [event.client for event in events if event.kind == "begin"]
        if beginning:
            self.simulation.server.keep_baseline()
            self.traffic.begin(self.t, beginning, self._message)
        for event in events:
            if event.kind != "begin":
                self._receive(event.client)
        return bool(events)

    def _draw(self, count: int) -> Sequence[str]:
        """Draw clients that neither train nor wait."""
        simulation = self.simulation
        busy = {*self.traffic.began, *self.buffer, *self.idle}
        seed = simulation.learner.initial_state.seed
        drawn = sample_clients(list(simulation.clients), count, seed, self.t, self.draws, busy)
        self.draws += 1
        return drawn

    def _message(self, client: str) -> Message:
        message = self.simulation.server.message(client)
        self.sent += message.nbytes
        return message

    def _receive(self, client: str) -> None:
        """Put the upload of a client that has finished into the buffer, unless it is too old."""
        server, most = self.simulation.server, self.simulation.participation.max_staleness
        began = self.traffic.began[client]
        answer = self.traffic.end(client)
        if answer is None:
            server.unanswered(client)
            self._lose(client, began)
            return
        server.delivered(client, began)
        self.received += size(answer.reply)
        if most is not None and self.t - began > most:
            self._note(
                f"the upload of client {client} is dropped: it began {self.t - began} rounds ago, and "
                f"participation.max_staleness is {most}"
            )
            self.lost += 1
        else:
            self.buffer[client] = began, answer.reply

    def _check(self) -> list[Reply]:
        """The replies in the buffer that can be used, ordered by client; the others are removed."""
        simulation = self.simulation
        replies = [reply for _, reply in self.buffer.values()]
        spec = simulation.server.reply_spec(
            {client: len(simulation.clients[client]) for client in self.buffer},
            began={client: began for client, (began, _) in self.buffer.items() if began != self.t},
        )
        checked = check_replies(replies, spec, simulation.uploads)
        self.refused += len(checked.refused)
        for refused, reason in checked.refused:
            self._note(f"upload refused: {reason}")
            for client in [client for client, (_, reply) in self.buffer.items() if reply is refused]:
                self._lose(client, self.buffer.pop(client)[0])
        for note in checked.notes:
            self._note(note)
        return sorted(checked.accepted, key=lambda reply: reply.client)

    def _lose(self, client: str, began: int) -> None:
        """A client that began in this round does not begin again in it, since it would do the same."""
        self.lost += 1
        if began == self.t:
            self.idle.add(client)

    def _note(self, text: str) -> None:
        self.callback.on_note(f"round {self.t + 1}: {text}")
