"""The rounds of a federation, in the order of the algorithm."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedsmoothlora.algebra.seeds import generator_for
from fedsmoothlora.callbacks import Callback, NotesOnly
from fedsmoothlora.federation.answers import answers, fewest, size, too_few
from fedsmoothlora.federation.asynchronous import AsynchronousUploads, Traffic, traffic
from fedsmoothlora.federation.contributions import Contribution, summed
from fedsmoothlora.federation.masked import MaskedUploads
from fedsmoothlora.federation.messages import Message, Reply, memmapped_reply
from fedsmoothlora.federation.participation import sample_clients, sample_in_secret
from fedsmoothlora.federation.records import Metric, RoundRecord
from fedsmoothlora.federation.round_metrics import (
    diagnosis,
    evaluated,
    metrics_of_round,
    seconds_of_diagnosis,
)
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.federation.uploads import check_replies
from fedsmoothlora.methods import Products
from fedsmoothlora.methods.base import PARTIAL_STARTS
from fedsmoothlora.modeling.memmap import memmapped


def run_rounds(simulation: Simulation, callback: Callback, *, resumed: bool = False) -> Iterator[RoundRecord]:
    """Run the federation, yielding a record before the first round and after every round.

    In round ``t`` every client receives the server updates that it lacks, starts from its round-matching and
    gradient-aligned matrices, trains, and uploads. The server averages the uploads and merges the average.

    With ``participation.buffer`` a round begins with clients that still train, and ends as soon as so many
    uploads are there (`fedsmoothlora.federation.asynchronous`).

    With ``privacy.secure_aggregation`` the server learns the sum of a round's uploads only
    (`fedsmoothlora.federation.masked`).

    With ``privacy.unit = "client"``, no round is repeated, not even an empty one, and records have only what
    follows from the noised means and the coordinator's test set.

    Args:
        simulation: the federation.
        callback: notified of every step.
        resumed: the state was restored from a checkpoint, so its evaluation is already recorded.

    Raises:
        FederationStoppedError: too few uploads of a round could be used, and no other clients are left.
        InterruptedRunError: ``should_stop`` returned True. A resumed run trains only the clients that had not
            replied.
    """
    server, backbone = simulation.server, simulation.learner.model.backbone
    alone = False  # whether an earlier round had a single upload
    partial = False  # whether an earlier round had starts in fewer directions than wanted
    in_flight = traffic(simulation, callback) if simulation.participation.asynchronous else None
    if not resumed:
        yield evaluated(simulation, [], callback)
    for t in range(server.round, server.rounds):
        began = time.perf_counter()
        uploads = _collector(simulation, t, callback, in_flight)
        replies = uploads.collect()  # steps 1 to 6 at every client
        metrics = uploads.metrics(replies)
        if len(replies) == 1 < len(simulation.clients) and not alone and server.private is None:
            alone = True
            callback.on_note(
                f"round {t + 1}: a single upload was accepted, so the update that all clients receive is "
                f"client {replies[0].client}'s own"
            )
        layers = max((reply.metrics.get(PARTIAL_STARTS, 0.0) for reply in replies), default=0.0)
        if layers and not partial:
            partial = True
            callback.on_note(
                f"round {t + 1}: the calibration gradients of up to {layers:g} layers have fewer directions "
                "than twice the rank, and these layers start in those that there are; more calibration rows "
                "(method.calibration_batches) may give more. Later rounds do not repeat this note."
            )
        lora = server.model
        update = server.aggregate(replies, uploads.total)  # S^t
        del replies  # frees their files before the next round's replies are stored
        backbone.merge(update.merge)  # W^{t+1} = W^t + s S^t
        seconds = time.perf_counter() - began - seconds_of_diagnosis(simulation, metrics)
        metrics += [
            *(Metric(None, name, value) for name, value in update.metrics.items()),
            Metric(None, "seconds_round", seconds),
            *diagnosis(simulation, update, lora, uploads.starts),
        ]
        yield evaluated(simulation, metrics, callback)


def _collector(
    simulation: Simulation, t: int, callback: Callback, in_flight: Traffic | None
) -> _Uploads | AsynchronousUploads | MaskedUploads:
    """Collects the uploads of round ``t``, or their sum."""
    if in_flight is not None:
        return AsynchronousUploads(simulation=simulation, t=t, callback=callback, traffic=in_flight)
    if simulation.learner.privacy.secure_aggregation:
        return MaskedUploads(simulation, t, callback)
    return _Uploads(simulation, t, callback)


@dataclass
class _Uploads:
    """Collects the uploads of a round. If too few can be used, the round is repeated with other clients.

    Attributes:
        simulation: the federation.
        t: the round.
        callback: notified of every step.
        attempt: how often the round was repeated.
        asked: the clients that were asked, in all attempts.
        starts: the clients' starts, if diagnostics are switched on.
        sent: size of all messages in bytes.
        received: size of all replies in bytes.
        refused: the number of refused replies.
        total: None: the server reads every upload.
    """

    simulation: Simulation
    t: int
    callback: Callback
    attempt: int = 0
    asked: list[str] = field(default_factory=list)
    starts: list[Products] = field(default_factory=list)
    sent: int = 0
    received: int = 0
    refused: int = 0
    total: None = None

    def collect(self) -> list[Reply]:
        """The accepted replies, ordered by client."""
        simulation, (wanted, _) = self.simulation, fewest(self.simulation)
        while True:
            clients = self._sample()
            self.callback.on_round_begin(self.t, simulation.server.rounds, len(clients))
            gradients: Mapping[str, Mapping[str, Tensor]] = {}
            if simulation.server.method.exchanges_gradients:
                gradients = self._exchange_gradients(clients)
                clients = list(gradients)
            accepted = self._check(clients, self._train(clients, gradients))
            if simulation.server.method.two_exchanges and len(accepted) >= wanted:
                accepted = self._second_exchange(accepted)
            if len(accepted) >= wanted:
                return sorted(accepted, key=lambda reply: reply.client)
            self.callback.on_note(
                f"round {self.t + 1}: {len(accepted)} of {len(clients)} uploads can be used, "
                f"{wanted} are needed; the round is repeated with other clients"
            )
            self.attempt += 1

    def metrics(self, accepted: Sequence[Reply]) -> list[Metric]:
        """The metrics of the accepted replies, and the round's numbers of clients and bytes.

        With ``privacy.unit = "client"`` there are none: each would tell something of who took part.
        """
        if self._private:
            return []
        return metrics_of_round(
            accepted,
            left_out=len(self.asked) - len(accepted),
            refused=self.refused,
            received=self.received,
            sent=self.sent,
            epsilons=self.simulation.server.report_epsilons(accepted),
            hides_counts=self.simulation.learner.privacy.hides_counts,
        )

    def _sample(self) -> list[str]:
        """Draw the clients of this attempt. Raises ``FederationStoppedError`` if no clients are left."""
        simulation = self.simulation
        if self._private:
            rate, seed = simulation.participation.sample_rate, simulation.learner.privacy.seed
            return sample_in_secret(list(simulation.clients), rate, self.t, seed)
        clients = sample_clients(
            list(simulation.clients),
            simulation.participation.count(len(simulation.clients)),
            simulation.learner.initial_state.seed,
            self.t,
            self.attempt,
            self.asked,
        )
        if not clients:
            raise too_few(simulation, self.t, self.attempt)
        self.asked += clients
        return clients

    @property
    def _private(self) -> bool:
        return self.simulation.server.private is not None

    def _exchange_gradients(self, clients: Sequence[str]) -> dict[str, Mapping[str, Tensor]]:
        """The gradients that each client receives before the round."""
        simulation, server = self.simulation, self.simulation.server
        # This is the message of the round, whose bytes are counted when the client trains.
        answers = simulation.engine.calibrate(
            simulation, clients, lambda client: server.message(client, self.attempt), self.callback
        )
        uploaded = {client: memmapped(gradients) for client, gradients in answers}  # many dense gradients
        ordered = sorted(uploaded)
        if not ordered:
            return {}
        exchanged = server.method.exchange(
            [uploaded[client] for client in ordered],
            [len(simulation.clients[client]) for client in ordered],
            generator_for(simulation.learner.initial_state.seed, "exchange", self.t, self.attempt),
        )
        self.received += sum(g.nbytes for gradients in uploaded.values() for g in gradients.values())
        by_client = dict(zip(ordered, exchanged, strict=True))
        return {client: by_client[client] for client in clients if client in by_client}

    def _train(self, clients: Sequence[str], gradients: Mapping[str, Mapping[str, Tensor]]) -> list[Reply]:
        """The replies of the clients, before any check."""
        server = self.simulation.server

        def message(client: str) -> Message:
            made = server.message(client, self.attempt)
            if client in gradients:
                made = replace(made, gradients=gradients[client])
            self.sent += made.nbytes
            return made

        replies: list[Reply] = []
        silent = set(clients)
        starts: dict[str, Products] = {}
        for answer in answers(self.simulation, self.t, self.attempt, clients, message, self.callback):
            server.delivered(answer.client)
            silent.discard(answer.client)
            replies.append(memmapped_reply(answer.reply))  # a thousand may wait for the end of the round
            if answer.start:
                starts[answer.client] = answer.start
        for client in silent:
            server.unanswered(client)
        # In the order in which clients were asked: metrics of starts are sums in that order.
        self.starts += [starts[client] for client in clients if client in starts]
        self.received += sum(size(reply) for reply in replies)
        return replies

    def _second_exchange(self, first: Sequence[Reply]) -> list[Reply]:
        """The accepted replies of the same clients to the sum of their first ones (a shared subspace).

        A client that is lost here has helped to choose the subspace, and does not count otherwise.
        """
        simulation, server = self.simulation, self.simulation.server
        before = {reply.client: reply for reply in sorted(first, key=lambda reply: reply.client)}
        server.begin_second_exchange(summed(map(Contribution.of, before.values())), self.attempt)

        def message(client: str) -> Message:
            made = server.second_message(client, self.attempt)
            self.sent += made.nbytes
            return made

        replies: list[Reply] = []
        silent = set(before)
        notes = NotesOnly(self.callback)  # the clients' bars have ended
        for answer in answers(simulation, self.t, self.attempt, list(before), message, notes, exchange=1):
            silent.discard(answer.client)
            replies.append(memmapped_reply(answer.reply))
        for client in silent:
            server.unanswered(client)
        self.received += sum(size(reply) for reply in replies)
        accepted = self._check(list(before), replies, exchange=1)
        return [
            replace(reply, metrics=_of_both(before[reply.client].metrics, reply.metrics))
            for reply in accepted
        ]

    def _check(self, clients: Sequence[str], replies: Sequence[Reply], *, exchange: int = 0) -> list[Reply]:
        """The replies that can be used."""
        simulation = self.simulation
        hidden = simulation.learner.privacy.hides_counts
        samples = {client: 1 if hidden else len(simulation.clients[client]) for client in clients}
        spec = simulation.server.reply_spec(samples, self.attempt, exchange=exchange)
        checked = check_replies(replies, spec, simulation.uploads)
        self.refused += len(checked.refused)
        for _, reason in checked.refused:
            self.callback.on_note(f"round {self.t + 1}: upload refused: {reason}")
        for note in checked.notes:
            self.callback.on_note(f"round {self.t + 1}: {note}")
        return checked.accepted


def _of_both(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a client's two replies; seconds that both have add up."""
    return {**first, **{name: first.get(name, 0.0) + value for name, value in second.items()}}
