"""The rounds of a federation, in the order of the algorithm."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

from fedsmoothlora.client import ClientState, Learner
from fedsmoothlora.data.examples import Examples
from fedsmoothlora.exchange import Message, Reply
from fedsmoothlora.server import Server
from fedsmoothlora.training import DivergedError, to_device
from fedsmoothlora.watching import Watcher


class FederationStoppedError(RuntimeError):
    """No client's upload could be used in a round; the message says what to try."""


@dataclass(frozen=True)
class Figure:
    """One number: of a client, or of the global model and the server where ``client`` is None."""

    client: str | None
    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """What a round came to. ``round`` counts finished rounds: 0 is the evaluation before any training."""

    round: int
    figures: Sequence[Figure]

    def value(self, name: str) -> float | None:
        """A figure of the global model or the server, by name."""
        return next((f.value for f in self.figures if f.client is None and f.name == name), None)


@dataclass(kw_only=True)
class Federation:
    """Clients, server and the model that they take turns with in this process.

    Attributes:
        server: its state.
        learner: what trains.
        clients: each client's training rows, by id.
        states: what each client keeps between rounds.
        test: the global test set.
        evaluation_batch_size: rows at once in an evaluation.
    """

    server: Server
    learner: Learner
    clients: Mapping[str, Examples]
    test: Examples
    evaluation_batch_size: int
    states: MutableMapping[str, ClientState] = field(default_factory=dict)


def run_rounds(federation: Federation, watcher: Watcher) -> Iterator[RoundRecord]:
    """Run the federation, yielding a record before the first round and after every round.

    Per round ``t``: each client gets the server's news, starts from its round-matching and
    gradient-aligned matrices, trains and uploads; the server averages, merges and goes on.

    Raises:
        FederationStoppedError: every client of a round diverged.
    """
    server, backbone = federation.server, federation.learner.model.backbone
    if server.round == 0:
        yield _evaluated(federation, [])
    for t in range(server.round, server.rounds):
        began = time.perf_counter()
        watcher.round_begins(t, server.rounds, len(federation.clients))
        messages: dict[str, Message] = {}
        replies: list[Reply] = []
        for client in federation.clients:
            messages[client] = server.message(client)
            reply = _visit(federation, client, messages[client], watcher)
            if reply is not None:
                server.delivered(client)
                replies.append(reply)
        if not replies:
            raise FederationStoppedError(_all_diverged(t, federation))
        update = server.aggregate(replies)  # S^t
        backbone.merge(update.merge)  # W^{t+1} = W^t + s S^t
        figures = [
            *(
                Figure(reply.client, name, value)
                for reply in replies
                for name, value in reply.figures.items()
            ),
            *(Figure(reply.client, "samples", reply.samples) for reply in replies),
            *(Figure(None, name, value) for name, value in update.figures.items()),
            Figure(None, "clients", len(replies)),
            Figure(None, "train_loss", _mean(replies, "train_loss")),
            Figure(None, "bytes_up", sum(reply.nbytes for reply in replies)),
            Figure(None, "bytes_down", sum(message.nbytes for message in messages.values())),
            Figure(None, "seconds_round", time.perf_counter() - began),
        ]
        yield _evaluated(federation, figures)


def _visit(federation: Federation, client: str, message: Message, watcher: Watcher) -> Reply | None:
    """One client's round; None if it diverged, which leaves its state as it was."""
    state = federation.states.get(client, ClientState())
    try:
        reply, federation.states[client] = federation.learner.visit(
            client, federation.clients[client], message, state, watcher
        )
    except DivergedError as error:
        watcher.note(f"client {client} diverged in round {message.round + 1} and is left out: {error}")
        return None
    finally:
        watcher.client_ends(client)
    return reply


def _evaluated(federation: Federation, figures: Sequence[Figure]) -> RoundRecord:
    """The round's record with the global model's metrics added."""
    began = time.perf_counter()
    model, server = federation.learner.model, federation.server
    model.backbone.place(server.lora)
    model.load_head(server.head)
    with model.without_lora():
        metrics = federation.learner.task.evaluate(
            model.model,
            federation.test,
            federation.evaluation_batch_size,
            lambda batch: to_device(batch, federation.learner.accelerator),
        )
    return RoundRecord(
        round=server.round,
        figures=[
            *(Figure(None, name, value) for name, value in metrics.items()),
            *figures,
            Figure(None, "seconds_evaluation", time.perf_counter() - began),
        ],
    )


def _mean(replies: Sequence[Reply], name: str) -> float:
    total = sum(reply.samples for reply in replies)
    return sum(reply.figures[name] * reply.samples for reply in replies) / total


def _all_diverged(t: int, federation: Federation) -> str:
    training = federation.learner.training
    tries = [f"a smaller training.lr than {training.lr}"]
    gamma = getattr(federation.learner.method.options, "gamma", None)
    if gamma is not None:
        tries.append(f"a larger method.gamma than {gamma} (a gentler start)")
    if training.max_grad_norm is None:
        tries.append("training.max_grad_norm = 1.0")
    return f"every client diverged in round {t + 1}; nothing was averaged. Try " + ", or ".join(tries)
