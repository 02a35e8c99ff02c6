"""How long a comparison will take and how much it will send, from a few measured batches of each variant."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedsmoothlora.algebra.seeds import generator_for
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import Config
from fedsmoothlora.data.examples import Subset
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.contributions import Contribution, summed
from fedsmoothlora.federation.devices import computing
from fedsmoothlora.federation.settings import PrivacySettings
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.logs import run_logging
from fedsmoothlora.reports.formats import readable_bytes
from fedsmoothlora.reports.formats import seconds as readable_seconds
from fedsmoothlora.runs.pace import Pace, rows_trained, seconds_of_run
from fedsmoothlora.runs.planning import Plan, build, plan

_STEPS = 3
_EVALUATION_BATCHES = 2
# Two from the first round that trains: clients match and catch up from the second round on only, and RoLoRA
# alternates.
_ROUNDS = 2


@dataclass(frozen=True, kw_only=True)
class MeasuredPace(Pace):
    """A pace with the bytes of a round.

    Attributes:
        up: bytes of a client's upload in the first rounds; later rounds alternate between the last two.
        down: bytes of a message in the first rounds; later rounds alternate between the last two.
    """

    up: Sequence[int]
    down: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One run of a variant: seconds, and bytes up and down of all clients. ``runs`` runs of it are left."""

    seconds: float
    bytes: float
    runs: int


def measure(planned: Plan) -> MeasuredPace:
    """Let the client with the most rows take a few steps in each of two rounds.

    The learning rate is almost 0: it does not change the time, and nothing diverges.

    Raises ``DivergedError`` if even the initial loss is not finite.
    """
    config = planned.config
    training = replace(
        config.training,
        steps=_STEPS,
        epochs=None,
        count_calibration=False,  # otherwise calibration would replace some of the timed steps
        lr=1e-12,
        lr_min=0.0,
        rounds=max(3, config.training.rounds),
    )
    torch.set_num_threads(config.machine.threads)
    # With privacy, a client would not report its times; the noise itself is not measured.
    probe = replace(planned, config=replace(config, training=training, privacy=PrivacySettings()))
    if getattr(config.task, "frozen_features", None) is not None:
        build(probe)  # evaluates the features and caches them, so that no run pays for them
    began = time.perf_counter()
    simulation = build(probe)
    loading = time.perf_counter() - began
    server, learner = simulation.server, simulation.learner
    client = max(simulation.clients, key=lambda one: len(simulation.clients[one]))
    data = simulation.clients[client]
    everyone = list(simulation.clients)[: config.participation.count(len(simulation.clients))]
    state, ups, downs, calibrating, second = ClientState(), [], [], 0.0, 0
    first = next(round for round in count() if server.method.trains_in(round))
    for _ in range(first + _ROUNDS):
        message = server.message(client)
        ahead: Mapping[str, Tensor] = {}
        if server.method.exchanges_gradients:
            began = time.perf_counter()
            ahead = learner.calibrate(client, data, message, state, Callback())
            calibrating = time.perf_counter() - began
            given = server.method.exchange(
                [ahead] * len(everyone), [1] * len(everyone), generator_for(config.seed, "forecast")
            )
            message = replace(message, gradients=given[0])
        visited = learner.visit(client, data, message, state, Callback())
        reply, state = visited.reply, visited.state
        for one in {client, *everyone}:
            server.delivered(one)
        ups.append(reply.nbytes + sum(gradient.nbytes for gradient in ahead.values()))
        downs.append(message.nbytes)
        if server.method.two_exchanges:
            server.begin_second_exchange(summed([Contribution.of(reply)]), 0)
            message = server.second_message(client)
            second = message.nbytes
            visited = learner.answer_second(client, data, message, state)
            reply = replace(visited.reply, metrics={**reply.metrics, **visited.reply.metrics})
            state = visited.state
            ups[-1] += reply.nbytes
            downs[-1] += second
        began = time.perf_counter()
        # As many uploads as in a real round; their values do not change the time.
        others = [replace(reply, client=one) for one in everyone if one != client]
        update = server.aggregate([reply, *others[: len(everyone) - 1]])
        learner.model.backbone.merge(update.merge)
        aggregate = time.perf_counter() - began
    rows = rows_trained(len(data), _STEPS, training.batch_size)
    return MeasuredPace(
        loading=loading,
        start=calibrating + reply.metrics["seconds_start"],
        row=reply.metrics["seconds_training"] / rows,
        upload=reply.metrics["seconds_upload"] + reply.metrics.get("seconds_second_upload", 0.0),
        aggregate=aggregate,
        evaluated_row=_evaluated_row(simulation),
        up=ups,
        down=[*downs, downs[-1] if ahead else server.message(client).nbytes + second],
    )


def _evaluated_row(simulation: Simulation) -> float:
    examples = simulation.test
    if examples is None:
        examples = max(simulation.validation.values(), key=len)
    few = min(len(examples), _EVALUATION_BATCHES * simulation.evaluation_batch_size)
    began = time.perf_counter()
    simulation.evaluate(Subset(examples, np.arange(few)))
    return (time.perf_counter() - began) / few


def bytes_of_run(planned: Plan, pace: MeasuredPace) -> int:
    """Bytes up and down of all clients, if the clients of a round also took part in the round before."""
    taking_part = planned.config.participation.merged(len(planned.partition.clients))
    rounds = range(planned.config.training.rounds)
    return taking_part * sum(_in_round(pace.up, t) + _in_round(pace.down, t) for t in rounds)


def _in_round(first: Sequence[int], t: int) -> int:
    """The bytes of round ``t``, of which the first rounds were measured."""
    measured = len(first)
    return first[t] if t < measured else first[measured - 2 + (t - measured) % 2]


def forecast(wanted: Mapping[str, tuple[Config, int]], jobs: int, console: Console) -> dict[str, Forecast]:
    """Measure a few batches of each variant, and print how long all runs will take.

    Args:
        wanted: by label, a configuration and the number of its runs that are left.
        jobs: the number of runs at a time.
        console: where to print.
    """
    found: dict[str, Forecast] = {}
    # Libraries' messages go into a log that is deleted.
    with tempfile.TemporaryDirectory() as folder, run_logging(Path(folder)):
        for label, (config, runs) in wanted.items():
            if runs:
                planned = plan(config)
                with computing(config.machine):
                    if not found:
                        measure(planned)  # imports and first calls take seconds, once in a process
                    pace = measure(planned)
                found[label] = Forecast(
                    seconds=seconds_of_run(planned, pace), bytes=bytes_of_run(planned, pace), runs=runs
                )
    head = ("variant", "runs left", "time of a run", "bytes of a run", "time of all its runs")
    table = Table(*head, box=None, pad_edge=False)
    for label, one in found.items():
        table.add_row(
            label,
            str(one.runs),
            readable_seconds(one.seconds),
            readable_bytes(one.bytes),
            readable_seconds(one.runs * one.seconds),
        )
    console.print(table)
    if any(config.machine.batch_clients > 1 for config, _ in wanted.values()):
        console.print("The times are those of one client after the other; machine.batch_clients takes less.")
    seconds = sum(one.runs * one.seconds for one in found.values())
    sent = sum(one.runs * one.bytes for one in found.values())
    console.print(
        f"{sum(one.runs for one in found.values())} runs, {readable_bytes(sent)}, about "
        f"{readable_seconds(seconds / jobs)} with {jobs} job{'s' if jobs > 1 else ''}: estimated from "
        f"{_ROUNDS} x {_STEPS} batches of each variant, if nothing else runs on this machine",
        highlight=False,
        soft_wrap=True,
    )
    return found
