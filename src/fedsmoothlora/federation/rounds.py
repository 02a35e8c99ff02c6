"""The rounds of a federation, in the order of the algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from fedsmoothlora.algebra.diagnostics import effective_rank, norm_and_cosine, spread
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.seeds import generator_for
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.data.examples import Examples
from fedsmoothlora.errors import FederationStoppedError
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.messages import Message, Reply, memmapped_reply
from fedsmoothlora.federation.participation import sample_clients
from fedsmoothlora.federation.server import Server
from fedsmoothlora.federation.server_optimizers import weight_deltas
from fedsmoothlora.federation.settings import ParticipationSettings, UploadSettings
from fedsmoothlora.federation.uploads import check_replies
from fedsmoothlora.methods import Products, ServerUpdate
from fedsmoothlora.modeling.memmap import memmapped
from fedsmoothlora.tasks.metrics import Measurement
from fedsmoothlora.tasks.objectives import Evaluation
from fedsmoothlora.training.loop import to_device

# Before the names of metrics of clients' own models: on the global test set, and on their validation rows.
ON_TEST = "on_test_"
OWN = "own_"


@dataclass(frozen=True)
class Metric:
    """One number: of a client, or of the global model and the server where ``client`` is None."""

    client: str | None
    name: str
    value: float


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """The result of a round. ``round`` counts finished rounds: 0 is the evaluation before any training.

    ``confusion`` is the global model's, rows by true and predicted class, where there are classes.
    """

    round: int
    metrics: Sequence[Metric]
    confusion: Tensor | None = None

    def value(self, name: str) -> float | None:
        """A metric of the global model or the server, by name."""
        return next((f.value for f in self.metrics if f.client is None and f.name == name), None)


class ClientStates(Protocol):
    """Where clients keep their states between rounds."""

    def load(self, client: str, callback: Callback) -> ClientState:
        """The state that the client kept; ``ClientState()`` if there is none that can be used."""
        ...

    def save(self, client: str, state: ClientState) -> None:
        """Keep the client's state."""
        ...


class MemoryStates:
    """Client states in memory, for few clients and runs that need not be resumed."""

    def __init__(self) -> None:
        self._states: dict[str, ClientState] = {}

    def load(self, client: str, callback: Callback) -> ClientState:
        """The state that the client kept."""
        return self._states.get(client, ClientState())

    def save(self, client: str, state: ClientState) -> None:
        """Keep the client's state."""
        self._states[client] = state


@dataclass(frozen=True, kw_only=True)
class ClientReply:
    """The reply of one client in a round.

    Attributes:
        client: its id.
        reply: may hold anything where the client is on another machine.
        start: the start of its local training, where rounds are diagnosed and the engine has it.
    """

    client: str
    reply: Reply
    start: Products = field(default_factory=dict)


class Replies(Protocol):
    """Where the replies of the round in progress are kept, in case that the run is stopped."""

    def keep(self, answer: ClientReply) -> None:
        """Keep a reply until its round is over."""
        ...

    def load(self, round: int, attempt: int, note: Callable[[str], None]) -> Mapping[str, ClientReply]:
        """The replies that were kept of an attempt of a round, by client; damaged ones are noted."""
        ...


class NoReplies:
    """Keeps no replies: a round that is stopped is repeated whole."""

    def keep(self, answer: ClientReply) -> None:
        """Keep nothing."""

    def load(self, round: int, attempt: int, note: Callable[[str], None]) -> Mapping[str, ClientReply]:
        """No replies."""
        return {}


class Engine(Protocol):
    """How clients are asked: in this process, in several, or on other machines. The rounds are the same.

    Attributes:
        in_turn: clients train one after the other, so that their seconds add up to a round's.
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
            simulation: whose round it is.
            clients: who is asked.
            message: makes a client's message, and counts it as sent; so it is called when it is sent.
            callback: notified of every client's round, and of the reason if a client gives no reply.

        Raises:
            InterruptedRunError: someone asked the run to stop.
        """
        ...

    def calibrate(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterable[tuple[str, Mapping[str, Tensor]]]:
        """As `train`, for the gradients that clients send ahead of a round if the method exchanges them."""
        ...

    def validate(
        self, simulation: Simulation, message: Callable[[str], Message], callback: Callback
    ) -> Mapping[str, Evaluation]:
        """The global model's metrics on every client's validation rows, by client.

        The model of ``simulation`` is the global one right now; who is elsewhere needs ``message``, which
        brings a client all of it, and counts it as sent.
        """
        ...


@dataclass(kw_only=True)
class Simulation:
    """A federation as its rounds see it: server, model, clients, and the engine that asks these.

    Attributes:
        engine: how clients are asked.
        server: its state.
        learner: what trains; it holds the global model too.
        clients: each client's training rows, by id.
        test: the global test set, if there is one.
        validation: each client's validation rows, by id; empty where none are kept.
        evaluation_batch_size: rows at once in an evaluation.
        evaluate_clients: also evaluate each client's own model, right after its training.
        participation: who takes part.
        uploads: which uploads count.
        states: what each client keeps between rounds.
        replies: the replies of the round in progress.
        should_stop: asked between clients.
        measurement: a costly metric of the global model, if one is wanted.
    """

    engine: Engine
    server: Server
    learner: Learner
    clients: Mapping[str, Examples]
    test: Examples | None
    evaluation_batch_size: int
    validation: Mapping[str, Examples] = field(default_factory=dict)
    evaluate_clients: bool = False
    participation: ParticipationSettings = field(default_factory=ParticipationSettings)
    uploads: UploadSettings = field(default_factory=UploadSettings)
    states: ClientStates = field(default_factory=MemoryStates)
    replies: Replies = field(default_factory=NoReplies)
    should_stop: Callable[[], bool] = lambda: False
    measurement: Measurement | None = None

    def evaluate(self, examples: Examples) -> Evaluation:
        """Measure the model as it stands."""
        learner = self.learner
        return learner.objective.evaluate(
            learner.model.model,
            examples,
            self.evaluation_batch_size,
            lambda batch: to_device(batch, learner.accelerator),
        )

    def measure(self) -> dict[str, float]:
        """The costly metrics of the model as it stands, in the rounds that they are wanted in."""
        learner = self.learner
        if self.measurement is None or not self.measurement.due(self.server.round, self.server.rounds):
            return {}
        return self.measurement.take(learner.model.model, lambda batch: to_device(batch, learner.accelerator))


def run_rounds(simulation: Simulation, callback: Callback, *, resumed: bool = False) -> Iterator[RoundRecord]:
    """Run the federation, yielding a record before the first round and after every round.

    ``resumed`` says that the state is a checkpoint's, whose evaluation was recorded already.

    In round ``t`` every client receives the server updates that it lacks, starts from its round-matching and
    gradient-aligned matrices, trains, and uploads. The server averages the uploads and merges the average.

    Raises:
        FederationStoppedError: too few uploads of a round could be used, and no other clients are left.
        InterruptedRunError: ``should_stop`` said so. A resumed run trains the clients that had not replied.
    """
    server, backbone = simulation.server, simulation.learner.model.backbone
    if not resumed:
        yield _evaluated(simulation, [], callback)
    for t in range(server.round, server.rounds):
        began = time.perf_counter()
        replies, metrics, starts = _collect(simulation, t, callback)  # steps 1 to 6 at every client
        lora = server.model
        update = server.aggregate(replies)  # S^t
        del replies  # and their files, before the next round's arrive
        backbone.merge(update.merge)  # W^{t+1} = W^t + s S^t
        metrics += [Metric(None, name, value) for name, value in update.metrics.items()]
        metrics.append(
            Metric(None, "seconds_round", time.perf_counter() - began - _diagnosing(simulation, metrics))
        )
        metrics += [
            Metric(None, name, value) for name, value in _diagnosis(simulation, update, lora, starts).items()
        ]
        yield _evaluated(simulation, metrics, callback)


def _collect(
    simulation: Simulation, t: int, callback: Callback
) -> tuple[list[Reply], list[Metric], list[Products]]:
    """The accepted uploads of round ``t``, the round's metrics, and the starts of its clients.

    Where too few count, the round is repeated with clients that were not asked yet.
    """
    server, settings = simulation.server, simulation.uploads
    asked: list[str] = []
    starts: list[Products] = []
    sent = received = refused = 0
    attempt = 0

    def message(client: str) -> Message:
        nonlocal sent
        made = server.message(client, attempt)
        sent += made.nbytes
        if not server.method.exchanges_gradients:
            return made
        sent += (whole := replace(made, gradients=given.get(client, {}))).nbytes - made.nbytes
        return whole

    while True:
        clients = sample_clients(
            list(simulation.clients),
            simulation.participation.count(len(simulation.clients)),
            simulation.learner.initial_state.seed,
            t,
            attempt,
            asked,
        )
        if not clients:
            raise FederationStoppedError(_too_few(simulation, t, attempt))
        asked += clients
        callback.on_round_begin(t, server.rounds, len(clients))
        given: Mapping[str, Mapping[str, Tensor]] = {}
        if server.method.exchanges_gradients:
            given, ahead = _exchange_gradients(simulation, clients, attempt, callback)
            clients, received = list(given), received + ahead
        replies: list[Reply] = []
        started: dict[str, Products] = {}
        for answer in _answers(simulation, clients, attempt, message, callback):
            server.delivered(answer.client)
            replies.append(memmapped_reply(answer.reply))  # a thousand may wait for the end of the round
            if answer.start:
                started[answer.client] = answer.start
        # In the order in which clients were asked: metrics of starts are sums in that order.
        starts += [started[client] for client in clients if client in started]
        checked = check_replies(replies, server.reply_spec(clients, attempt), settings)
        received += sum(_size(reply) for reply in replies)
        refused += len(checked.refused)
        for _, reason in checked.refused:
            callback.on_note(f"round {t + 1}: upload refused: {reason}")
        if len(checked.accepted) >= settings.min_clients:
            break
        callback.on_note(
            f"round {t + 1}: {len(checked.accepted)} of {len(clients)} uploads can be used, "
            f"{settings.min_clients} are needed; it is repeated with other clients"
        )
        attempt += 1
    accepted = sorted(checked.accepted, key=lambda reply: reply.client)
    metrics = [
        *(Metric(reply.client, name, value) for reply in accepted for name, value in reply.metrics.items()),
        *(Metric(reply.client, "samples", reply.samples) for reply in accepted),
        *(Metric(reply.client, "bytes_up", reply.nbytes) for reply in accepted),
        Metric(None, "clients", len(accepted)),
        Metric(None, "left_out", len(asked) - len(accepted)),
        Metric(None, "refused", refused),
        Metric(None, "train_loss", _mean(accepted, "train_loss")),
        Metric(None, "bytes_up", received),
        Metric(None, "bytes_down", sent),
    ]
    return accepted, metrics, starts


def _answers(
    simulation: Simulation,
    clients: Sequence[str],
    attempt: int,
    message: Callable[[str], Message],
    callback: Callback,
) -> Iterator[ClientReply]:
    """The replies that were kept before the run was stopped, then those of the other clients."""
    t = simulation.server.round
    kept = simulation.replies.load(t, attempt, callback.on_note)
    for client in clients:
        if client in kept:
            message(client)  # counted as sent, as when the client replied
            callback.on_client_end(client)
            yield kept[client]
    left = [client for client in clients if client not in kept]
    if len(left) < len(clients):
        callback.on_note(
            f"round {t + 1}: {len(clients) - len(left)} of {len(clients)} clients had replied before the run "
            "was stopped, and are not trained again"
        )
    for answer in simulation.engine.train(simulation, left, message, callback) if left else ():
        simulation.replies.keep(answer)
        yield answer


def _exchange_gradients(
    simulation: Simulation, clients: Sequence[str], attempt: int, callback: Callback
) -> tuple[dict[str, Mapping[str, Tensor]], int]:
    """The gradients that each client receives ahead of a round, and the bytes that clients sent for them."""
    server = simulation.server
    asked = simulation.engine.calibrate(
        simulation, clients, lambda client: server.message(client, attempt), callback
    )
    sent = {client: memmapped(gradients) for client, gradients in asked}  # dense ones, of many clients
    ordered = sorted(sent)
    if not ordered:
        return {}, 0
    given = server.method.exchange(
        [sent[client] for client in ordered],
        [len(simulation.clients[client]) for client in ordered],
        generator_for(simulation.learner.initial_state.seed, "exchange", server.round, attempt),
    )
    found = dict(zip(ordered, given, strict=True))
    ahead = sum(gradient.nbytes for gradients in sent.values() for gradient in gradients.values())
    return {client: found[client] for client in clients if client in found}, ahead


def _diagnosis(
    simulation: Simulation, update: ServerUpdate, lora: Products, starts: Sequence[Products]
) -> dict[str, float]:
    """Metrics that explain the round, where they are wanted; ``lora`` is the server's before it."""
    server = simulation.server
    if not simulation.learner.diagnoses:
        return {}
    scales = {name: layer.scale for name, layer in server.layers.items()}
    delta = weight_deltas(update, lora)
    norm, cosine = norm_and_cosine(delta, server.last_delta, scales)
    server.last_delta = delta
    totals = [_total(simulation, name) for name in server.layers]
    ranks = [effective_rank(total) for total in totals if total is not None]
    metrics = {"update_norm": norm, "start_distance": spread(starts, scales)}
    if cosine is not None:
        metrics["update_cosine"] = cosine
    if ranks:
        metrics["merged_effective_rank"] = sum(ranks) / len(ranks)
    return metrics


def _diagnosing(simulation: Simulation, metrics: Sequence[Metric]) -> float:
    """Seconds of a round that explaining it took, and that it would not have taken otherwise."""
    if not simulation.engine.in_turn:
        return 0.0
    return sum(metric.value for metric in metrics if metric.name == "seconds_diagnosis")


def _total(simulation: Simulation, name: str) -> LowRank | Tensor | None:
    """The difference of a layer's global weight from the pretrained one, over ``s``."""
    merged, lora = simulation.learner.model.backbone.merged(name), simulation.server.model.get(name)
    if merged is None or lora is None:
        return lora if merged is None else merged
    lora = lora.to(device=merged.device)  # from the server to the model
    return merged + lora.dense() if isinstance(merged, Tensor) else merged + lora


def _size(reply: Reply) -> int:
    """Bytes of a reply that may hold anything."""
    try:
        return reply.nbytes
    except (AttributeError, TypeError):
        return 0


def _evaluated(simulation: Simulation, metrics: Sequence[Metric], callback: Callback) -> RoundRecord:
    """The round's record with the global model's metrics added.

    Without a test set, they are the means of the clients' validation metrics, weighted by size.
    """
    began = time.perf_counter()
    model, server = simulation.learner.model, simulation.server
    model.backbone.set_shift(server.model)
    model.load_head(server.head)
    if not simulation.learner.method.traits.global_model and server.round:
        return _without_global_model(simulation, metrics)
    sent = 0

    def message(client: str) -> Message:
        nonlocal sent
        made = replace(server.message(client), lora=server.transport.coded(server.model), head=server.head)
        sent += made.nbytes
        return made

    with model.without_lora():
        by_client = simulation.engine.validate(simulation, message, callback)
        if simulation.test is not None:
            overall = simulation.evaluate(simulation.test)
        else:
            overall = _weighted(by_client, simulation.validation)
        measured = simulation.measure()
    return RoundRecord(
        round=server.round,
        metrics=[
            *(Metric(None, name, value) for name, value in {**overall.metrics, **measured}.items()),
            *(Metric(client, n, v) for client, one in by_client.items() for n, v in one.metrics.items()),
            *metrics,
            *([Metric(None, "bytes_down_validation", sent)] if sent else []),
            Metric(None, "seconds_evaluation", time.perf_counter() - began),
        ],
        confusion=overall.confusion,
    )


def _without_global_model(simulation: Simulation, metrics: Sequence[Metric]) -> RoundRecord:
    """The round's record where clients have models of their own only: means over those who took part.

    Over their metrics on the test set; without one, over those on their validation rows, weighted by size.
    """
    prefix, weights = ON_TEST, dict.fromkeys(simulation.clients, 1.0)
    if simulation.test is None:
        prefix, weights = OWN, {client: len(rows) for client, rows in simulation.validation.items()}
    found = [f for f in metrics if f.client in weights and f.name.startswith(prefix)]
    means = []
    for name in dict.fromkeys(metric.name for metric in found):
        same = [metric for metric in found if metric.name == name]
        total = sum(weights[str(metric.client)] for metric in same)
        value = sum(metric.value * weights[str(metric.client)] for metric in same) / total
        means.append(Metric(None, name.removeprefix(prefix), value))
    mark = Metric(None, "mean_of_clients", len({metric.client for metric in found}))
    return RoundRecord(round=simulation.server.round, metrics=[*means, mark, *metrics])


def _weighted(by_client: Mapping[str, Evaluation], rows: Mapping[str, Examples]) -> Evaluation:
    """Means over clients of the metrics that all of them have, weighted by what each is a mean over."""
    evaluations = list(by_client.values())
    names = [n for n in evaluations[0].metrics if all(n in one.metrics for one in evaluations)]
    weights = [one.weight or len(rows[client]) for client, one in by_client.items()]

    def mean(values: Iterable[float]) -> float:
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)

    metrics = {name: mean(one.metrics[name] for one in evaluations) for name in names}
    if "perplexity" in metrics:  # the exp of a mean, not a mean of exps
        metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))
    matrices = [one.confusion for one in evaluations if one.confusion is not None]
    return Evaluation(metrics, torch.stack(matrices).sum(dim=0) if matrices else None)


def _mean(replies: Sequence[Reply], name: str) -> float:
    total = sum(reply.samples for reply in replies)
    return sum(reply.metrics[name] * reply.samples for reply in replies) / total


def _too_few(simulation: Simulation, t: int, attempts: int) -> str:
    training = simulation.learner.training
    tries = [f"a smaller training.lr than {training.lr}"]
    tries += simulation.learner.method.divergence_advice()
    if training.max_grad_norm is None:
        tries.append("training.max_grad_norm = 1.0")
    return (
        f"round {t + 1}: after {attempts} {'attempt' if attempts == 1 else 'attempts'} no other clients are "
        f"left, and fewer than uploads.min_clients = {simulation.uploads.min_clients} could be used. Where "
        f"clients diverged, try {', or '.join(tries)}"
    )
