"""A federation: the server, the clients, and the interface of the engine that runs the clients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.data.examples import Examples
from fedsmoothlora.federation.accounting import Ledger, MemoryLedger
from fedsmoothlora.federation.arrivals import Arrivals, MemoryArrivals, RoundArrivals
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.server import Server
from fedsmoothlora.federation.settings import ParticipationSettings, UploadSettings
from fedsmoothlora.methods import Products
from fedsmoothlora.secure_aggregation.fixed_point import Words
from fedsmoothlora.tasks.metrics import Measurement
from fedsmoothlora.tasks.objectives import Evaluation
from fedsmoothlora.training.loop import to_device


class ClientStates(Protocol):
    """Storage of client states between rounds."""

    def load(self, client: str, callback: Callback) -> ClientState:
        """The client's state; ``ClientState()`` if there is none or it cannot be used."""
        ...

    def save(self, client: str, state: ClientState) -> None:
        """Store the client's state."""
        ...

    def ledger(self, client: str) -> Ledger:
        """The client's ledger of releases, with ``privacy.unit = "sample"``."""
        ...


class MemoryStates:
    """Client states in memory, for few clients and runs that are never resumed."""

    def __init__(self) -> None:
        self._states: dict[str, ClientState] = {}
        self._ledgers: dict[str, MemoryLedger] = {}

    def load(self, client: str, callback: Callback) -> ClientState:
        """The client's state; ``ClientState()`` if there is none."""
        return self._states.get(client, ClientState())

    def save(self, client: str, state: ClientState) -> None:
        """Store the client's state."""
        self._states[client] = state

    def ledger(self, client: str) -> Ledger:
        """The client's ledger of releases."""
        return self._ledgers.setdefault(client, MemoryLedger())


@dataclass(frozen=True, kw_only=True)
class ClientReply:
    """The reply of one client in a round.

    Attributes:
        client: the client's id.
        reply: the client's reply, unchecked.
        start: the start of the client's local training, if diagnostics are on and the engine has it.
    """

    client: str
    reply: Reply
    start: Products = field(default_factory=dict)


class Replies(Protocol):
    """Storage of the replies of the round in progress, so that a resumed run need not train again."""

    def keep(self, answer: ClientReply) -> None:
        """Store a reply until its round is over."""
        ...

    def load(
        self, round: int, attempt: int, note: Callable[[str], None], *, exchange: int = 0
    ) -> Mapping[str, ClientReply]:
        """The stored replies of an exchange in an attempt of a round, by client; damaged ones are noted."""
        ...


class NoReplies:
    """Stores no replies, so an interrupted round is repeated as a whole."""

    def keep(self, answer: ClientReply) -> None:
        """Store nothing."""

    def load(
        self, round: int, attempt: int, note: Callable[[str], None], *, exchange: int = 0
    ) -> Mapping[str, ClientReply]:
        """No replies."""
        return {}


@dataclass(frozen=True, kw_only=True)
class BegunSum:
    """A session of secure aggregation before its sites reveal shares (`fedsmoothlora.federation.masked`).

    Attributes:
        round: ``t``.
        exchange: 1 for the second sum of a round that has two, otherwise 0.
        attempt: how often it was repeated.
        asked: the clients of the session, sorted.
        sent: bytes of all messages of the round in this exchange.
        epsilons: by client, its epsilon with ``privacy.unit = "sample"``.
        transcript: all that the server needs to remove the masks from the sum, but the shares.
    """

    round: int
    exchange: int
    attempt: int
    asked: tuple[str, ...]
    sent: int
    epsilons: Mapping[str, float]
    transcript: bytes


@dataclass(frozen=True, kw_only=True)
class KeptSum:
    """The sum of masked uploads, as the server learned it.

    Attributes:
        round: ``t``.
        exchange: 1 for the second sum of a round that has two, otherwise 0.
        attempt: how often it was repeated.
        asked: the clients of the session, sorted.
        summed: the clients whose integers are in the sum, sorted.
        refused: how many clients broke the rules.
        sent: bytes of all messages of the round in this exchange.
        epsilons: by client, its epsilon with ``privacy.unit = "sample"``.
        numbers: the sum of the integers.
    """

    round: int
    exchange: int
    attempt: int
    asked: tuple[str, ...]
    summed: tuple[str, ...]
    refused: int
    sent: int
    epsilons: Mapping[str, float]
    numbers: Words


class Sums(Protocol):
    """Storage of the sums of masked uploads, and of the session in progress."""

    def begin(self, round: int, exchange: int) -> int:
        """The number of a new attempt of a sum, which is recorded: no attempt is begun twice."""
        ...

    def keep_begun(self, begun: BegunSum) -> None:
        """Store a session whose sites are about to reveal shares."""
        ...

    def begun(self, round: int, exchange: int) -> BegunSum | None:
        """The stored session of a sum; None if there is none."""
        ...

    def keep(self, found: KeptSum) -> None:
        """Store a sum."""
        ...

    def load(self, round: int, exchange: int) -> KeptSum | None:
        """The stored sum; None if there is none."""
        ...


class MemorySums:
    """Sums in memory, for runs that are never resumed."""

    def __init__(self) -> None:
        self._last = (-1, -1, -1)
        self._begun: BegunSum | None = None
        self._sums: dict[tuple[int, int], KeptSum] = {}

    def begin(self, round: int, exchange: int) -> int:
        """The number of a new attempt of a sum."""
        attempt = self._last[2] + 1 if self._last[:2] == (round, exchange) else 0
        self._last = round, exchange, attempt
        return attempt

    def keep_begun(self, begun: BegunSum) -> None:
        """Store a session whose sites are about to reveal shares."""
        self._begun = begun

    def begun(self, round: int, exchange: int) -> BegunSum | None:
        """The stored session of a sum; None if there is none."""
        found = self._begun
        return found if found and (found.round, found.exchange) == (round, exchange) else None

    def keep(self, found: KeptSum) -> None:
        """Store a sum."""
        self._sums[found.round, found.exchange] = found

    def load(self, round: int, exchange: int) -> KeptSum | None:
        """The stored sum; None if there is none."""
        return self._sums.get((round, exchange))


class Engine(Protocol):
    """Runs the clients of a round: in this process, in several processes, or on other machines.

    Attributes:
        in_turn: whether clients train one after the other, so that their seconds add up to the round's.
    """

    @property
    def in_turn(self) -> bool: ...

    def train(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterable[ClientReply]:
        """Send each of ``clients`` its message, and yield the replies in any order.

        Args:
            simulation: the federation.
            clients: the clients to ask.
            message: builds a client's message and counts its bytes; called when the message is sent.
            callback: notified of every client's round, and of the reason if a client does not reply.

        Raises:
            InterruptedRunError: the run was asked to stop.
        """
        ...

    def calibrate(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterable[tuple[str, Mapping[str, Tensor]]]:
        """The gradients that clients send before a round, for methods that exchange them; see `train`."""
        ...

    def validate(
        self, simulation: Simulation, message: Callable[[str], Message], callback: Callback
    ) -> Mapping[str, Evaluation]:
        """The global model's metrics on every client's validation rows, by client.

        When this is called, the model of ``simulation`` is the global model. A client on another machine
        receives it in a message from ``message``, which counts its bytes.
        """
        ...

    def personal(
        self, simulation: Simulation, message: Callable[[str], Message], callback: Callback
    ) -> Mapping[str, Mapping[str, float]]:
        """The metrics of clients' personal models after the federation, by client with validation rows.

        Args:
            simulation: the federation.
            message: builds a client's message, with the server's whole LoRA and head, and counts its bytes.
            callback: notified of the reason if a client has no metrics.

        Raises:
            InterruptedRunError: the run was asked to stop.
        """
        ...


@dataclass(kw_only=True)
class Simulation:
    """A federation: server, model, clients, and the engine that runs the clients.

    Attributes:
        engine: runs the clients.
        server: the server and its state.
        learner: the model and settings with which clients train; the model is also the global model.
        clients: each client's training rows, by id.
        test: the global test set, if there is one.
        validation: each client's validation rows, by id; empty if there are none.
        evaluation_batch_size: rows in each evaluation batch.
        evaluate_clients: whether to evaluate each client's own model after its training.
        personal_steps: steps for which every client fine-tunes the final global model; None does not.
        participation: the settings by which clients are drawn for a round.
        uploads: the settings by which uploads are checked.
        states: storage of client states between rounds.
        arrivals: the record of arrivals in asynchronous rounds.
        replayed: the recorded rounds whose order of arrivals is repeated; None to simulate speeds.
        replies: storage of the replies of the round in progress.
        sums: storage of the sums of masked uploads, with secure aggregation.
        should_stop: called between clients; True ends the run.
        measurement: a costly metric of the global model, if one is configured.
    """

    engine: Engine
    server: Server
    learner: Learner
    clients: Mapping[str, Examples]
    test: Examples | None
    evaluation_batch_size: int
    validation: Mapping[str, Examples] = field(default_factory=dict)
    evaluate_clients: bool = False
    personal_steps: int | None = None
    participation: ParticipationSettings = field(default_factory=ParticipationSettings)
    uploads: UploadSettings = field(default_factory=UploadSettings)
    states: ClientStates = field(default_factory=MemoryStates)
    arrivals: Arrivals = field(default_factory=MemoryArrivals)
    replayed: Sequence[RoundArrivals] | None = None
    replies: Replies = field(default_factory=NoReplies)
    sums: Sums = field(default_factory=MemorySums)
    should_stop: Callable[[], bool] = lambda: False
    measurement: Measurement | None = None

    def evaluate(self, examples: Examples) -> Evaluation:
        """Evaluate the model in its current state."""
        learner = self.learner
        return learner.objective.evaluate(
            learner.model.model,
            examples,
            self.evaluation_batch_size,
            lambda batch: to_device(batch, learner.accelerator),
        )

    def measure(self, *, rounds: int | None = None) -> dict[str, float]:
        """The costly metric of the model in its current state; empty in rounds in which it is not due.

        Args:
            rounds: the number of rounds of the run; the server's unless given.
        """
        learner = self.learner
        if self.measurement is None or not self.measurement.due(
            self.server.round, rounds or self.server.rounds
        ):
            return {}
        return self.measurement.take(learner.model.model, lambda batch: to_device(batch, learner.accelerator))
