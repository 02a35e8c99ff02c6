"""The metrics of a round: those of its replies and of the global model, and diagnostics."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from fedsmoothlora.algebra.diagnostics import effective_rank, norm_and_cosine, spread
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.data.examples import Examples
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.records import ON_TEST, OWN, Metric, RoundRecord
from fedsmoothlora.federation.server_optimizers import weight_deltas
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.methods import Products, ServerUpdate
from fedsmoothlora.tasks.objectives import Evaluation


def evaluated(simulation: Simulation, metrics: Sequence[Metric], callback: Callback) -> RoundRecord:
    """Evaluate the global model, and return the round's record with its metrics added.

    Without a test set, the metrics are means of the clients' validation metrics, weighted by number of rows.
    """
    began = time.perf_counter()
    server = simulation.server
    if not simulation.learner.method.traits.global_model and server.round:
        return _without_global_model(simulation, metrics)
    sent = 0

    def message(client: str) -> Message:
        nonlocal sent
        made = _whole_message(simulation, client)
        sent += made.nbytes
        return made

    with _global_model(simulation):
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


def measured_at_end(simulation: Simulation) -> RoundRecord:
    """The costly metric of a run that ends early; an empty record if this round was already measured."""
    server, measurement = simulation.server, simulation.measurement
    if measurement is None or measurement.due(server.round, server.rounds):
        return RoundRecord(round=server.round, metrics=[])
    if not simulation.learner.method.traits.global_model:
        return RoundRecord(round=server.round, metrics=[])
    with _global_model(simulation):
        measured = simulation.measure(rounds=server.round)
    return RoundRecord(
        round=server.round, metrics=[Metric(None, name, value) for name, value in measured.items()]
    )


def personal_at_end(simulation: Simulation, callback: Callback) -> RoundRecord:
    """The metrics of clients' personal models after the federation; an empty record if there are none.

    Raises ``InterruptedRunError`` if the run is asked to stop between two clients.
    """
    server = simulation.server
    if not simulation.learner.personal.on and simulation.personal_steps is None:
        return RoundRecord(round=server.round, metrics=[])
    began = time.perf_counter()
    sent = 0

    def message(client: str) -> Message:
        nonlocal sent
        made = _whole_message(simulation, client, personal=1)
        sent += made.nbytes
        return made

    by_client = simulation.engine.personal(simulation, message, callback)
    return RoundRecord(
        round=server.round,
        metrics=[
            *(Metric(client, n, v) for client, one in by_client.items() for n, v in one.items()),
            Metric(None, "bytes_down_personal", sent),
            Metric(None, "seconds_at_end", time.perf_counter() - began),
        ],
    )


def _whole_message(simulation: Simulation, client: str, personal: int = 0) -> Message:
    """A message with the whole global model."""
    server = simulation.server
    return replace(
        server.message(client),
        lora=server.whole_lora(),
        head=server.head,
        changes={},
        basis={},  # nothing is uploaded
        personal=personal,
    )


@contextmanager
def _global_model(simulation: Simulation) -> Iterator[None]:
    """Make the model the global model."""
    model, server = simulation.learner.model, simulation.server
    model.backbone.set_shift(server.model)
    model.load_head(server.head)
    with model.without_lora():
        yield


def _without_global_model(simulation: Simulation, metrics: Sequence[Metric]) -> RoundRecord:
    """The round's record if there is no global model: means of metrics over the clients that took part.

    These are the metrics of the clients' models on the test set. Without a test set, they are those on their
    validation rows, weighted by number of rows.
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
    """Means over clients, weighted by what each metric is a mean over.

    A metric is the mean over those clients that have it.
    """
    weights = {client: one.weight or len(rows[client]) for client, one in by_client.items()}

    def mean(name: str) -> float:
        having = {client: one.metrics[name] for client, one in by_client.items() if name in one.metrics}
        total = sum(weights[client] for client in having)
        return sum(value * weights[client] for client, value in having.items()) / total

    names = dict.fromkeys(name for one in by_client.values() for name in one.metrics)
    metrics = {name: mean(name) for name in names if name != "perplexity" or "loss" in names}
    if "perplexity" in metrics:  # the exp of a mean, not a mean of exps
        metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))
    matrices = [one.confusion for one in by_client.values() if one.confusion is not None]
    return Evaluation(metrics, torch.stack(matrices).sum(dim=0) if matrices else None)


def metrics_of_replies(
    replies: Sequence[Reply], *, hides_counts: bool = False
) -> tuple[list[Metric], list[Metric]]:
    """The metrics of the accepted replies by client, and the mean training loss, weighted by samples.

    With ``hides_counts`` the numbers of samples are not known.
    The mean is over the clients that report a loss; it is missing if no client does.
    """
    losses = [
        (reply.metrics["train_loss"], reply.samples) for reply in replies if "train_loss" in reply.metrics
    ]
    samples = sum(count for _, count in losses)
    mean_loss = [Metric(None, "train_loss", sum(loss * n for loss, n in losses) / samples)] if losses else []
    by_client = [
        *(Metric(reply.client, name, value) for reply in replies for name, value in reply.metrics.items()),
        *(Metric(reply.client, "samples", reply.samples) for reply in replies if not hides_counts),
        *(Metric(reply.client, "bytes_up", reply.nbytes) for reply in replies),
    ]
    return by_client, mean_loss


def metrics_of_round(
    accepted: Sequence[Reply],
    *,
    left_out: int,
    refused: int,
    received: int,
    sent: int,
    epsilons: Sequence[Metric] = (),
    hides_counts: bool = False,
) -> list[Metric]:
    """The metrics of the accepted replies, and the round's numbers of clients and bytes.

    Args:
        accepted: the replies.
        left_out: the number of clients whose work does not count.
        refused: the number of refused uploads among them.
        received: bytes of all replies.
        sent: bytes of all messages.
        epsilons: the clients' epsilons, with ``privacy.unit = "sample"``.
        hides_counts: whether the clients' numbers of samples are not known.
    """
    by_client, train_loss = metrics_of_replies(accepted, hides_counts=hides_counts)
    return [
        *by_client,
        *epsilons,
        Metric(None, "clients", len(accepted)),
        Metric(None, "left_out", left_out),
        Metric(None, "refused", refused),
        *train_loss,
        Metric(None, "bytes_up", received),
        Metric(None, "bytes_down", sent),
    ]


def diagnosis(
    simulation: Simulation, update: ServerUpdate, lora: Products, starts: Sequence[Products]
) -> list[Metric]:
    """Diagnostics of the round, if they are switched on; ``lora`` is the server's LoRA before the round."""
    server = simulation.server
    if not simulation.learner.diagnoses:
        return []
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
    return [Metric(None, name, value) for name, value in metrics.items()]


def seconds_of_diagnosis(simulation: Simulation, metrics: Sequence[Metric]) -> float:
    """Seconds that diagnostics added to the round."""
    if not simulation.engine.in_turn:
        return 0.0
    return sum(metric.value for metric in metrics if metric.name == "seconds_diagnosis")


def _total(simulation: Simulation, name: str) -> LowRank | Tensor | None:
    """The difference of a layer's global and pretrained weights, divided by ``s``."""
    merged, lora = simulation.learner.model.backbone.merged(name), simulation.server.model.get(name)
    if merged is None or lora is None:
        return lora if merged is None else merged
    lora = lora.to(device=merged.device)  # from the server to the model
    return merged + lora.dense() if isinstance(merged, Tensor) else merged + lora
