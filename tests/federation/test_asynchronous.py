"""Asynchronous rounds: FedBuff's formula, the virtual clock, records, replays, resumed runs, refusals."""

from __future__ import annotations

import copy
import io
import json
import math
import os
import shutil
import signal
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank, with_core
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError, FederationStoppedError, InterruptedRunError, StateError
from fedsmoothlora.federation.arrivals import Event, RoundArrivals
from fedsmoothlora.federation.asynchronous import AsynchronousUploads, traffic
from fedsmoothlora.federation.changes import received
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.participation import client_speeds
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.server import Server
from fedsmoothlora.federation.settings import ParticipationSettings, UploadSettings
from fedsmoothlora.federation.simulation import ClientReply, Simulation
from fedsmoothlora.federation.uploads import ReplySpec, check_replies
from fedsmoothlora.methods import Layer
from fedsmoothlora.runs.check import check
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run
from fedsmoothlora.storage.arrivals import StoredArrivals, read_arrivals
from fedsmoothlora.training.settings import TrainingSettings
from tests.federation.test_partial_participation import (
    Recorded,
    close,
    dense,
    densely,
    diverging_when,
    quiet,
    traces,
)

Make = Callable[..., Simulation]

# --- clients with quadratic losses, without a model


@dataclass
class Quadratics:
    """An engine whose clients take one gradient step of ``(W - a_c)^2 / 2`` from the weights they receive."""

    targets: Mapping[str, float]
    diverges: Callable[[str, int], bool] = lambda client, round: False
    states: dict[str, ClientState] = field(default_factory=dict)
    histories: dict[str, ClientState] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)  # W^t
    begun: list[tuple[str, int]] = field(default_factory=list)
    in_turn = True

    def train(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterator[ClientReply]:
        for client in clients:
            made = message(client)
            self.begun.append((client, made.round))
            state = self.states.get(client, ClientState()).after(made)
            if made.accepted_round >= 0:  # what round matching needs
                assert made.accepted_round in state.uploads
                assert state.received_since(made.accepted_round, made.round) is not None
            everything = self.histories.get(client, ClientState()).after(replace(made, forget_before=-1))
            self.histories[client] = everything
            received = everything.received_since(0, made.round)
            assert received is not None
            W = float(received["w"].dense()) if received else 0.0
            assert self.weights[made.round] == pytest.approx(W)  # catch-up messages add up to W^t
            if self.diverges(client, made.round):
                continue
            sent = {"w": torch.tensor([[0.5 * (self.targets[client] - W)]])}
            self.states[client] = state.with_upload(made.round, {})
            yield ClientReply(
                client=client, reply=Reply(client=client, round=made.round, samples=1, sent=sent)
            )


def quadratics(
    participation: Mapping[str, Any],
    targets: Mapping[str, float],
    rounds: int,
    steps: int = 6,
    seed: int = 0,
    replayed: Sequence[RoundArrivals] | None = None,
    **engine: Any,
) -> Simulation:
    """A federation of one layer ``(1, 1)`` with the method ``full``."""
    chosen = ParticipationSettings(**participation)
    method = read(
        {"name": "x", "model": {"source": "x"}, "data": {"source": "x"}, "method": {"name": "full"}}
    ).method
    layers = {"w": Layer(name="w", m=1, n=1, rank=1, scale=1.0, gradient_rank=1)}
    initial = InitialState(layers, seed, lambda name: torch.zeros(1, 1))
    training = TrainingSettings(rounds=rounds, steps=steps)
    learner = SimpleNamespace(initial_state=initial, training=training, method=method)
    return Simulation(
        engine=cast(Any, Quadratics(targets, **engine)),
        server=Server(
            method=method,
            layers=layers,
            initial_state=initial,
            rounds=rounds,
            head={},
            participation=chosen,
        ),
        learner=cast(Any, learner),
        clients={client: cast(Any, [0]) for client in targets},
        test=None,
        evaluation_batch_size=1,
        participation=chosen,
        uploads=UploadSettings(max_norm_factor=math.inf),
        replayed=replayed,
    )


def weights_of(simulation: Simulation) -> list[float]:
    """``W^0 ... W^T``, after all rounds."""
    engine, server = cast(Quadratics, simulation.engine), simulation.server
    engine.weights.append(0.0)
    flight = traffic(simulation, Callback())
    for t in range(server.rounds):
        uploads = AsynchronousUploads(simulation=simulation, t=t, callback=Callback(), traffic=flight)
        update = server.aggregate(uploads.collect()).merge["w"]
        engine.weights.append(engine.weights[-1] + float(cast(Tensor, update)))
    return engine.weights


THREE = {"a": 1.0, "b": 2.0, "c": 4.0}
SPEEDS = {"a": 3.0, "b": 1.0, "c": 0.5}  # of 6 steps each: 2, 6 and 12 units of time


def test_three_quadratic_clients_follow_the_numbers_computed_by_hand() -> None:
    simulation = quadratics({"buffer": 1, "clients": 3, "speeds": SPEEDS}, THREE, rounds=9)
    expected = [
        0,
        0.5,  # time 2: a, 1/2 (1 - 0)
        0.75,  # time 4: a, 1/2 (1 - 0.5)
        0.875,  # time 6: a, 1/2 (1 - 0.75)
        1.375,  # time 6: b, began 3 rounds ago, w = 1/2: 1/2 * 1/2 (2 - 0)
        1.1875,  # time 8: a, 1/2 (1 - 1.375)
        1.09375,  # time 10: a
        1.046875,  # time 12: a
        1.203125,  # time 12: b, began at 1.375 three rounds ago: 1/2 * 1/2 (2 - 1.375)
        1.203125 + 2 / 3,  # time 12: c, began 8 rounds ago, w = 1/3: 1/3 * 1/2 (4 - 0)
    ]
    assert weights_of(simulation) == pytest.approx(expected, rel=1e-6)
    merged = [one.merged for one in simulation.arrivals.rounds]
    assert merged == [
        (("a", 0),),
        (("a", 1),),
        (("a", 2),),
        (("b", 0),),
        (("a", 4),),
        (("a", 5),),
        (("a", 6),),
        (("b", 4),),
        (("c", 0),),
    ]
    arrived = [e.time for one in simulation.arrivals.rounds for e in one.events if e.kind == "arrive"]
    assert arrived == [2, 4, 6, 6, 8, 10, 12, 12, 12]


def test_constant_weights_and_the_largest_staleness() -> None:
    table = {"buffer": 1, "clients": 3, "speeds": SPEEDS, "staleness_weight": "constant"}
    assert weights_of(quadratics(table, THREE, rounds=4))[-1] == pytest.approx(1.875)
    # The upload of b at time 6 is three rounds old and is dropped; a's of time 8 is the fourth round.
    dropping = quadratics({**table, "max_staleness": 2}, THREE, rounds=4)
    assert weights_of(dropping)[-1] == pytest.approx(0.9375)
    assert [one.merged[0][0] for one in dropping.arrivals.rounds] == ["a"] * 4


def test_a_round_ends_with_fewer_uploads_if_no_other_client_is_left() -> None:
    table = {"buffer": 3, "clients": 3}
    simulation = quadratics(table, THREE, rounds=2, diverges=lambda client, round: client == "b")
    weights_of(simulation)
    assert [dict(one.merged).keys() for one in simulation.arrivals.rounds] == [{"a", "c"}, {"a", "c"}]
    stuck = quadratics(table, THREE, rounds=2, diverges=lambda client, round: True)
    with pytest.raises(FederationStoppedError, match=r"round 1: .* no other clients are left"):
        weights_of(stuck)


@st.composite
def stories(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(2, 7))
    at_once = draw(st.integers(1, count))
    speed = st.sampled_from([0.1, 0.5, 1.0, 1.0, 2.0, 3.0]) | st.floats(0.05, 20)
    return {
        "table": {
            "buffer": draw(st.integers(1, at_once)),
            "clients": at_once,
            "speeds": tuple(draw(st.lists(speed, min_size=count, max_size=count))),
            "max_staleness": draw(st.none() | st.integers(0, 3)),
        },
        "targets": {f"client {i}": float(i) for i in range(count)},
        "fates": draw(st.sets(st.tuples(st.integers(0, count - 1), st.integers(0, 9)), max_size=6)),
    }


@settings(max_examples=30, deadline=None)
@given(story=stories(), seed=st.integers(0, 2**32))
def test_every_client_that_begins_is_merged_dropped_or_lost_exactly_once(story: Any, seed: int) -> None:
    table, fates = story["table"], {(f"client {i}", t) for i, t in story["fates"]}
    simulation = quadratics(
        table, story["targets"], rounds=10, seed=seed, diverges=lambda client, t: (client, t) in fates
    )
    try:
        weights_of(simulation)
    except FederationStoppedError:
        return  # all clients of a round diverged
    engine = cast(Quadratics, simulation.engine)
    rounds = simulation.arrivals.rounds
    merged = [one for arrivals in rounds for one in arrivals.merged]
    in_flight = [(client, began) for _, client, began in simulation.server.in_flight.clients]
    events = [event for arrivals in rounds for event in arrivals.events]
    assert len(set(engine.begun)) == len(engine.begun)
    assert [event.time for event in events] == sorted(event.time for event in events)
    # All other clients diverged, or their uploads were older than the limit.
    lost = set(engine.begun) - set(merged) - set(in_flight)
    assert len(merged) == len(set(merged))
    assert not set(merged) & set(in_flight)
    at_work: dict[str, int] = {}
    ended: list[tuple[str, int, int]] = []
    for t, arrivals in enumerate(rounds):
        for event in arrivals.events:
            if event.kind == "begin":
                at_work[event.client] = t
                assert len(at_work) <= table["clients"]
            else:
                ended.append((event.client, at_work.pop(event.client), t))
        assert len(arrivals.merged) <= table["buffer"]
    assert len(ended) + len(in_flight) == len(engine.begun)
    for client, began, t in ended:
        stale = table["max_staleness"] is not None and t - began > table["max_staleness"]
        assert ((client, began) in lost) == (stale or (client, began) in fates)
    # The record alone gives the same run.
    replay = quadratics(
        {**table, "speeds": None, "replay": "a run"},
        story["targets"],
        rounds=10,
        seed=seed + 1,
        replayed=rounds,
    )
    assert weights_of(replay) == engine.weights
    assert replay.arrivals.rounds == rounds


def test_a_record_that_does_not_fit_is_refused() -> None:
    recorded = quadratics({"buffer": 2, "clients": 3, "speeds": SPEEDS}, THREE, rounds=3)
    weights_of(recorded)
    rounds = recorded.arrivals.rounds
    for table, changed, said in (
        (
            {"buffer": 1},
            rounds,
            "round 1: the recorded run merged the uploads of a, b, and this run",
        ),
        ({"buffer": 2}, [RoundArrivals((), (Event("arrive", "a", 1.0),))], "'arrive' of client a cannot"),
        ({"buffer": 2}, [RoundArrivals((), (Event("begin", "a", 0.0),) * 2)], "'begin' of client a cannot"),
    ):
        replay = quadratics({**table, "clients": 3, "replay": "r"}, THREE, rounds=3, replayed=changed)
        with pytest.raises((StateError, FederationStoppedError), match=said):
            weights_of(replay)


# --- speeds


def test_speeds_depend_on_the_seed_and_the_clients_id_only() -> None:
    names = [f"site {i}" for i in range(2000)]
    for rule, log in (("uniform", False), ("lognormal:0.5", True)):
        drawn = client_speeds(rule, names, 3)
        assert client_speeds(rule, names[::-1][:5], 3) == {name: drawn[name] for name in names[::-1][:5]}
        assert client_speeds(rule, names, 4) != drawn
        values = np.array(list(drawn.values()))
        if log:
            assert np.log(values).mean() == pytest.approx(0, abs=0.05)
            assert np.log(values).std() == pytest.approx(0.5, rel=0.05)
        else:
            assert values.min() >= 0.5
            assert values.max() <= 1.5
            assert values.mean() == pytest.approx(1, abs=0.03)
    assert client_speeds(None, ["a", "b"], 0) == client_speeds("equal", ["a", "b"], 0) == {"a": 1, "b": 1}
    assert client_speeds((2.0, 3.0), ["a", "b"], 0) == {"a": 2, "b": 3}
    assert client_speeds({"b": 3.0, "a": 2.0}, ["a", "b"], 0) == {"a": 2, "b": 3}


# --- whole federations


def asynchronously(buffer: int, at_once: int, clients: int, **more: Any) -> dict[str, Any]:
    return {
        "partition": {"kind": "dirichlet", "clients": clients, "alpha": 1.0, "min_size": 4},
        "participation.clients": at_once,
        "participation.buffer": buffer,
        "training.steps": 2,
        "training.rounds": 4,
        **{key.replace("__", "."): value for key, value in more.items()},
    }


SPREAD = (1.0, 0.6, 0.35, 1.3, 0.2)

NEW = {"staleness", "staleness_max", "simulated_time"}


def outcome(simulation: Simulation) -> tuple[Any, ...]:
    """Everything that a federation of equal bits has in common."""
    records = list(run_rounds(simulation, Callback()))
    server = simulation.server
    return (
        [
            (r.round, f.client, f.name, f.value)
            for r in records
            for f in r.metrics
            if not f.name.startswith("seconds") and f.name not in NEW
        ],
        [{name: dense(value).tolist() for name, value in update.items()} for update in server.updates],
        {name: dense(value).tolist() for name, value in server.model.items()},
        {name: value.tolist() for name, value in server.head.items()},
        server.accepted,
        server.received,
    )


@pytest.mark.parametrize("method", ["fedsmoothlora", "fedit"])
@pytest.mark.parametrize(("at_once", "clients"), [(2, 4), (3, 3)])
def test_equal_speeds_and_a_buffer_for_all_give_the_bits_of_synchronous_rounds(
    toy_federation: Make, method: str, at_once: int, clients: int
) -> None:
    table = asynchronously(at_once, at_once, clients, method__name=method, training__rounds=3)
    if method == "fedit":
        table["method"] = {"name": "fedit"}
        del table["method.name"]
    synchronous = {key: value for key, value in table.items() if key != "participation.buffer"}
    assert outcome(toy_federation(table)) == outcome(toy_federation(synchronous))


class KeptReplies:
    """Remembers every reply by client and round."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int], Reply] = {}

    def keep(self, answer: ClientReply) -> None:
        self.found[answer.client, answer.reply.round] = answer.reply

    def load(
        self, round: int, attempt: int, note: Callable[[str], None], *, exchange: int = 0
    ) -> Mapping[str, ClientReply]:
        return {}


def numbers(value: LowRank | Tensor) -> np.ndarray[Any, Any]:
    return dense(value).numpy()


@pytest.mark.parametrize("method", ["fedit", "full"])
def test_the_global_model_follows_fedbuff_in_numpy(toy_federation: Make, method: str) -> None:
    federation = toy_federation(
        asynchronously(2, 3, 5, method={"name": method}, participation__speeds=SPREAD, training__rounds=6)
    )
    replies = KeptReplies()
    federation.replies = replies
    server = federation.server
    held: list[dict[str, np.ndarray[Any, Any]]] = []

    def now() -> dict[str, np.ndarray[Any, Any]]:
        found = {f"head {name}": numbers(value) for name, value in server.head.items()}
        if method == "fedit":
            for name in server.layers:
                lora = server.model.get(name) or server.initial_state.initial(name)
                found |= {f"{name} B": numbers(lora.B), f"{name} A": numbers(lora.A)}
        return found

    def uploaded(reply: Reply) -> dict[str, np.ndarray[Any, Any]]:
        found = {f"head {name}": numbers(value) for name, value in reply.head.items()}
        for name, value in reply.sent.items():
            if isinstance(value, LowRank):
                found |= {f"{name} B": numbers(value.B), f"{name} A": numbers(value.A)}
        return found

    stale = set()
    for record in run_rounds(federation, Callback()):
        held.append(now())
        if not record.round:
            continue
        t = record.round - 1
        merged = federation.arrivals.rounds[t].merged
        total = sum(replies.found[one].samples for one in merged)
        expected = dict(held[t])
        ages = [t - began for _, began in merged]
        stale |= {*ages}
        for (client, began), age in zip(merged, ages, strict=True):
            reply = replies.found[client, began]
            p, w = reply.samples / total, 1 / math.sqrt(1 + age)
            for name, value in uploaded(reply).items():
                expected[name] = expected[name] + p * w * (value - held[began][name])
        for name, value in expected.items():
            np.testing.assert_allclose(held[-1][name], value, rtol=2e-5, atol=2e-7)
        if method == "full":
            for name in server.layers:
                change = sum(
                    replies.found[one].samples
                    / total
                    / math.sqrt(1 + t - one[1])
                    * numbers(cast(Tensor, replies.found[one].sent[name]))
                    for one in merged
                )
                np.testing.assert_allclose(numbers(server.updates[t][name]), change, rtol=2e-5, atol=2e-7)
        assert record.value("staleness") == pytest.approx(np.mean(ages))
        assert record.value("staleness_max") == max(ages)
    assert stale >= {0, 1, 2}


@dataclass
class Held:
    """The server's state at the start of a round, densely, by layer."""

    merged: dict[str, Tensor]
    model: dict[str, LowRank]
    lora: Mapping[str, LowRank | Tensor]
    left: dict[str, Tensor]


def held_by(server: Server) -> Held:
    updates = [densely(decoded(update)) for update in server.updates]
    zero = {name: torch.zeros(layer.m, layer.n).double() for name, layer in server.layers.items()}
    return Held(
        {n: sum((one[n] for one in updates if n in one), zero[n]) for n in server.layers},
        {n: server.model.get(n) or server.initial_state.initial(n) for n in server.layers},
        dict(decoded(server.lora or {})),
        dict(server.changes.left),
    )


def weights(name: str, held: Held, server: Server) -> Tensor:
    """The global weight of a layer, without the pretrained one."""
    return held.merged[name] + (dense(held.model[name]) if server.model else 0)


def product_change(name: str, sent: Any, then: Held, server: Server) -> Tensor:
    """The change of a layer's weight by a client that sends its product, a factor, or a core."""
    if server.method.name == "ravan":
        fixed = server.initial_state.orthonormal(name)
        core = sent - then.lora[name] if then.lora else sent
        return fixed.B.double() @ with_core(core, fixed.A).double()
    if server.method.name == "ffa":
        return (sent - then.model[name].B).double() @ then.model[name].A.double()
    keeps_lora = server.method.name in ("fedmomentum", "flexlora")
    return dense(sent) - (dense(then.model[name]) if keeps_lora else 0)


EXACT = ["fedmomentum", *(pytest.param(one, marks=pytest.mark.slow) for one in ("flora", "ffa", "ravan"))]


def asynchronous_rounds(
    federation: Simulation,
) -> Iterator[tuple[Held, Held, list[tuple[float, Reply, Held]]]]:
    """Every round: what the server held before and after, and weight, reply and start of merged clients."""
    replies = KeptReplies()
    federation.replies = replies
    held: list[Held] = []
    for record in run_rounds(federation, Callback()):
        held.append(held_by(federation.server))
        if not record.round:
            continue
        t = record.round - 1
        merged = federation.arrivals.rounds[t].merged
        total = sum(replies.found[one].samples for one in merged)
        yield (
            held[t],
            held[t + 1],
            [
                (
                    replies.found[one].samples / total / math.sqrt(1 + t - one[1]),
                    replies.found[one],
                    held[one[1]],
                )
                for one in merged
            ],
        )


@pytest.mark.parametrize("method", EXACT)
def test_exact_methods_add_the_weighted_changes_of_the_clients_models(
    toy_federation: Make, method: str
) -> None:
    """``W^{t+1} = W^t + sum_c p_c w(k_c) (W_c - W^tau)`` in dense matrices."""
    table = asynchronously(2, 3, 5, method={"name": method}, participation__speeds=SPREAD)
    federation = toy_federation(table)
    server = federation.server
    for before, after, merged in asynchronous_rounds(federation):
        for name in server.layers:
            change = sum(
                (
                    w * product_change(name, decoded(reply.sent)[name], then, server)
                    for w, reply, then in merged
                ),
                torch.zeros_like(before.merged[name]),
            )
            expected = weights(name, before, server) + change
            close(weights(name, after, server), expected, float(expected.norm() + change.norm()))


@pytest.mark.slow
def test_flexlora_frlora_and_fedsa_change_what_they_keep(toy_federation: Make) -> None:
    for method in ("flexlora", "frlora", "fedsa"):
        table = asynchronously(2, 3, 5, method={"name": method}, participation__speeds=SPREAD)
        federation = toy_federation(table)
        server = federation.server
        for before, after, merged in asynchronous_rounds(federation):
            for name, layer in server.layers.items():
                if method == "flexlora":
                    mean = dense(before.model[name]) + sum(
                        w * product_change(name, reply.sent[name], then, server) for w, reply, then in merged
                    )
                    best = float(torch.linalg.svdvals(mean)[layer.rank :].norm())
                    found = dense(after.model[name])
                    assert float((found - mean).norm()) <= best + 2e-5 * float(mean.norm())
                elif method == "frlora":
                    start = server.initial_state.prepared[name].to(dtype=torch.float64)
                    sent = [(w, cast(LowRank, reply.sent[name])) for w, reply, _ in merged]
                    B = start.B + sum(w * (one.B.double() - start.B) for w, one in sent)
                    A = start.A + sum(w * (one.A.double() - start.A) for w, one in sent)
                    change = after.merged[name] - before.merged[name]
                    close(change, B @ A - start.dense(), float(start.norm()))
                else:
                    initial = server.initial_state.initial(name).A
                    changes = sum(
                        w * (cast(Tensor, reply.sent[name]) - then.lora.get(name, initial))
                        for w, reply, then in merged
                    )
                    close(cast(Tensor, after.lora[name]), before.lora.get(name, initial) + changes)


def test_server_feedback_keeps_what_truncation_and_coding_lost_of_weighted_uploads(
    toy_federation: Make,
) -> None:
    """``sum_t S^t + E = sum_t sum_c p_c w(k_c) dec_c``, as in synchronous rounds."""
    preset = {"name": "fedsmoothlora", "preset": "low_bit", "gamma": 64, "calibration_batches": 2}
    federation = toy_federation(
        asynchronously(2, 3, 5, method=preset, participation__speeds=SPREAD, transport__bits=4)
    )
    server = federation.server
    total: dict[str, Tensor] = {}
    for _, after, merged in asynchronous_rounds(federation):
        for w, reply, _ in merged:
            for name, value in decoded(reply.sent).items():
                total[name] = total.get(name, 0) + w * dense(value)
        for name, sum_of_uploads in total.items():
            close(after.merged[name] + dense(server.memory[name]), sum_of_uploads)


def test_changes_in_few_bits_are_added_to_what_the_server_holds_now(toy_federation: Make) -> None:
    """``held^{t+1} + e^{t+1} = held^t + e^t + sum_c p_c w(k_c) dec(change_c)``, ``e`` what coding lost."""
    table = asynchronously(2, 3, 5, method={"name": "fedit"}, participation__speeds=SPREAD, transport__bits=4)
    federation = toy_federation(table)
    for before, after, merged in asynchronous_rounds(federation):
        for name in federation.server.layers:
            for part in ("B", "A"):
                key = f"{name}.lora_{part}"
                change = sum(w * received(reply.sent[key]) for w, reply, _ in merged)
                left = before.left.get(key, 0)
                found = getattr(after.model[name], part) + after.left[key]
                close(found.double(), (getattr(before.model[name], part) + left + change).double())


def test_round_matching_counts_from_the_round_in_which_the_last_upload_began(toy_federation: Make) -> None:
    """``R = zeta rho^(t-1-tau) (U_c - sum_{j=tau}^{t-1} S^j)``, and ``S^t`` is the weighted sum."""
    federation = toy_federation(
        asynchronously(2, 3, 5, participation__speeds=SPREAD, training__rounds=7, training__lr=0.05)
    )
    replies = KeptReplies()
    federation.replies = replies
    recorded = Recorded(federation)
    recorded.run()
    S = [densely(update) for update in federation.server.updates]
    merged_in = {one: t for t, arrivals in enumerate(federation.arrivals.rounds) for one in arrivals.merged}
    matched = set()
    for visit in recorded.visits:
        t, client = visit.round, visit.client
        tau = max((b for (c, b), when in merged_in.items() if c == client and when < t), default=-1)
        assert (visit.message.accepted_round, visit.kept_round) == (tau, tau)
        for name in federation.server.layers:
            if tau < 0:
                assert not visit.match[name].any()
                continue
            since = sum((S[j][name] for j in range(tau, t)), torch.zeros_like(S[0][name]))
            mine = dense(replies.found[client, tau].sent[name])
            close(visit.match[name], 0.5 ** (t - 1 - tau) * (mine - since), float((mine - since).norm()))
            matched.add(t - 1 - tau)
    assert {0, 1, 2} <= matched
    for t, arrivals in enumerate(federation.arrivals.rounds):
        total = sum(replies.found[one].samples for one in arrivals.merged)
        for name, layer in federation.server.layers.items():
            mean = sum(
                replies.found[one].samples
                / total
                / math.sqrt(1 + t - one[1])
                * dense(replies.found[one].sent[name])
                for one in arrivals.merged
            )
            best = float(torch.linalg.svdvals(mean)[layer.rank :].norm())
            assert float((S[t][name] - mean).norm()) <= best + 2e-5 * float(mean.norm())


# --- runs in folders: records, replays, resumed runs


@pytest.fixture
def unsteady(toy_table: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """A run whose clients finish at different times: two of three clients at work fill a round."""

    def table(**method: Any) -> dict[str, Any]:
        return {
            **toy_table,
            "partition": {"kind": "iid", "clients": 5},
            "participation": {"clients": 3, "buffer": 2, "speeds": list(SPREAD)},
            "training": {"rounds": 5, "steps": 2, "batch_size": 8, "lr": 0.02},
            **({"method": method} if method else {}),
        }

    return table


def same(folder: Path, other: Path) -> None:
    """Two runs have the same bits and files. Names of stored replies are hashes that depend on seconds."""
    mine, others = traces(folder), traces(other)
    for found in (mine, others):
        found["names"] = [name[: len("replies/")] if "replies/" in name else name for name in found["names"]]
    assert mine == others
    assert record_of(folder) == record_of(other)


def record_of(folder: Path) -> Any:
    return json.loads((folder / "arrivals.json").read_text())


@pytest.mark.parametrize(
    "method",
    [
        pytest.param({}, id="fedsmoothlora", marks=pytest.mark.slow),
        pytest.param({"name": "fedit"}, id="fedit"),
        pytest.param({"name": "fedsmoothlora", "preset": "weights"}, id="packed", marks=pytest.mark.slow),
    ],
)
def test_a_replay_and_a_resumed_run_are_the_same_to_the_bit(
    unsteady: Any, method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = unsteady(**method)
    run(table, out=tmp_path / "whole", console=quiet())
    rounds = record_of(tmp_path / "whole")["rounds"]
    assert [len(one["merged"]) for one in rounds] == [2] * 5
    assert any(began < t for t, one in enumerate(rounds, 1) for _, began in one["merged"])

    def interrupting(client: str, message: Message) -> bool:
        if message.round == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "visit", diverging_when(interrupting))
        with pytest.raises(InterruptedRunError):
            run(table, out=folder, console=quiet())
    # The newest checkpoint is damaged, so the run is resumed from the one before.
    newest = max((folder / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    run(resume=folder, console=quiet())
    same(folder, tmp_path / "whole")

    again = tmp_path / "again"
    participation = {"clients": 3, "buffer": 2, "replay": str(tmp_path / "whole")}
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "visit", diverging_when(interrupting))
        with pytest.raises(InterruptedRunError):
            run({**table, "participation": participation}, out=again, console=quiet())
    run(resume=again, console=quiet())
    same(again, tmp_path / "whole")


def test_a_client_in_flight_whose_stored_reply_is_damaged_counts_as_lost(
    unsteady: Any, tmp_path: Path
) -> None:
    folder, said = tmp_path / "run", io.StringIO()
    run({**unsteady(), "training": {**unsteady()["training"], "rounds": 5}}, out=folder, console=quiet())
    in_flight = json.loads((folder / "checkpoints" / "0004.json").read_text())["in_flight"]["clients"]
    for path in (folder / "checkpoints").glob("0005*"):
        path.unlink()
    for path in (folder / "replies").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    shutil.rmtree(folder / "model")
    run(resume=folder, console=Console(file=said, width=500))
    events = record_of(folder)["rounds"][4]["events"]
    failed = {client for kind, client, _ in events if kind == "fail"}
    assert failed
    assert failed <= {client for _, client, _ in in_flight}
    assert "is truncated or was altered" in said.getvalue()


def test_the_documented_configuration_runs(toy_table: dict[str, Any], tmp_path: Path) -> None:
    page = Path(__file__).parents[2] / "docs" / "asynchronous.md"
    table = tomllib.loads(page.read_text().partition("```toml\n")[2].partition("```")[0])
    assert read(table).participation.buffer == 2
    toy = {"model": toy_table["model"], "data": toy_table["data"]}
    found = run(
        {**table, **toy},
        {"training.rounds": 3, "method.calibration_batches": 1},
        out=tmp_path / "run",
        console=quiet(),
    )
    names = {line["name"] for line in found.metrics if line["round"] == 3}
    assert names >= NEW
    assert len(record_of(tmp_path / "run")["rounds"]) == 3


def test_the_check_says_what_buffer_and_concurrency_mean(unsteady: Any) -> None:
    said = io.StringIO()
    check(read(unsteady(), {"participation.max_staleness": 4}), Console(file=said, width=1000))
    assert (
        "asynchronous: 3 of 5 clients train at the same time, and a round ends as soon as 2 uploads are "
        "there; an upload that began k rounds ago counts with weight 1/sqrt(1 + k), and is dropped if k > 4"
    ) in said.getvalue()
    assert "a round: 2 clients" in said.getvalue()


@pytest.mark.slow
def test_several_processes_give_the_bits_of_one(unsteady: Any, tmp_path: Path) -> None:
    run(unsteady(), out=tmp_path / "one", console=quiet())
    run(unsteady(), {"machine.jobs": 2}, out=tmp_path / "two", console=quiet())
    same(tmp_path / "two", tmp_path / "one")


def test_a_damaged_or_incomplete_record_is_named(tmp_path: Path) -> None:
    arrivals = StoredArrivals(tmp_path / "arrivals.json")
    one = RoundArrivals((("a", 0),), (Event("begin", "a", 0.0), Event("arrive", "a", 1.5)))
    arrivals.record(0, one)
    arrivals.record(1, one)
    assert arrivals.rounds == (one, one)
    arrivals.record(1, RoundArrivals((), ()))  # the run was resumed after round 1
    assert arrivals.rounds == (one, RoundArrivals((), ()))
    with pytest.raises(StateError, match=r"arrivals of 2 rounds, and the run has finished 3"):
        arrivals.record(3, one)
    for text in (
        "",
        "{}",
        '{"format": 2, "rounds": []}',
        '{"format": 1, "rounds": [{"merged": [["a", 0]]}]}',
    ):
        (tmp_path / "arrivals.json").write_text(text)
        with pytest.raises(StateError, match=r"arrivals\.json is not a record of arrivals"):
            read_arrivals(tmp_path / "arrivals.json")


def test_replies_are_checked_against_the_round_in_which_they_began() -> None:
    """The change of a head is its difference from the head that was sent down in that round."""
    old, new = {"b": torch.zeros(3)}, {"b": torch.full((3,), 100.0)}
    spec = ReplySpec(
        **{"experiment": "", "round": 5, "attempt": 0, "clients": {"a": 1, "b": 1, "c": 1}},
        **{"head": new, "began": {"a": 3}, "heads": {3: old}},
    )

    def reply(client: str, round: int, head: Mapping[str, Tensor]) -> Reply:
        moved = {name: value + 1 for name, value in head.items()}
        return Reply(client=client, round=round, samples=1, sent={}, head=moved)

    replies = [reply("a", 3, old), reply("b", 5, new), reply("c", 3, old)]
    checked = check_replies(replies, spec, UploadSettings(max_norm_factor=2.0))
    assert [one.client for one in checked.accepted] == ["a", "b"]
    assert "its reply is for round 4; this is round 6" in checked.refused[0][1]


# --- keys


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"participation.buffer": 4}, r"participation\.buffer = 4 is above participation\.clients = 3"),
        ({"participation.clients": None, "participation.buffer": 9}, r"buffer = 9 uploads, but only 5 of 5"),
        ({"uploads.min_clients": 3}, r"uploads\.min_clients = 3.*participation\.buffer = 2"),
        ({"participation.speeds": "fast"}, r"participation\.speeds = 'fast' must be 'equal'"),
        ({"participation.speeds": "lognormal:0"}, r"'lognormal:0' must be"),
        ({"participation.speeds": "lognormal:nan"}, r"'lognormal:nan' must be"),
        ({"participation.speeds": [1.0, 2.0]}, r"lists 2 speeds for 5 clients"),
        ({"participation.speeds": [1.0, 1.0, 1.0, 1.0, 0.0]}, r"a speed must be a number from 1e-6 to 1e6"),
        ({"participation.speeds": {"0": 1.0, "7": 1.0}}, r"there is no client '7'"),
        ({"participation.speeds": {"0": 1.0}}, r"has no speed for client '1'"),
        ({"participation.speeds": "equal", "participation.replay": "x"}, r"recorded order of arrivals takes"),
        ({"participation.speeds": None, "participation.replay": "x"}, r"replay must be the folder of an"),
        ({"participation.buffer": None}, r"participation\.speeds = .* belongs to asynchronous rounds"),
        (
            {"participation.buffer": None, "participation.speeds": None, "participation.max_staleness": 2},
            r"participation\.max_staleness = 2 belongs to asynchronous rounds",
        ),
        ({"method": {"name": "rolora"}}, r"method 'rolora': rounds train B and A in turn"),
        ({"method": {"name": "fed_svd"}}, r"method 'fed_svd': each SVD renews A"),
        ({"method": {"name": "local"}}, r"method 'local': its server averages nothing"),
        ({"method.gradient_aligned": "shared"}, r"buffer = 2 does not work .* exchanges gradients"),
        ({"method.server_feedback": True}, r"method\.server_feedback .*zeta = 0"),
        (
            {"method": {"name": "flexlora"}, "lora.client_ranks": "halving"},
            r"buffer = 2 with lora\.client_ranks does not work with method 'flexlora'",
        ),
        (
            {"method": {"name": "fedit"}, "training.scaffold": True, "training.momentum": 0.0},
            r"buffer = 2 does not work with training\.scaffold",
        ),
        (
            {"privacy": {"unit": "client", "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}},
            r"buffer = 2 does not work with privacy\.unit = 'client'",
        ),
        (
            {"privacy": {"unit": "sample", "clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-5}},
            r"buffer = 2 does not work with privacy\.unit = 'sample'",
        ),
        ({"personal.ditto": 0.1}, r"buffer = 2 does not work with personal\.ditto = 0\.1"),
        ({"evaluation.diagnostics": True}, r"buffer = 2 does not work with evaluation\.diagnostics"),
        (
            {"server": {"aggregation": "multi_krum", "byzantine": 1}},
            r"needs 5 uploads, but 2 clients take part",
        ),
    ],
    ids=lambda value: None,
)
def test_values_that_are_wrong_or_do_nothing_are_refused(unsteady: Any, changes: Any, said: str) -> None:
    table = copy.deepcopy(unsteady())
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if not name:
            table[section] = value
        elif value is None:
            del table[section][name]
        else:
            table.setdefault(section, {})[name] = value
    with pytest.raises(ConfigError, match=said):
        plan(read(table))
