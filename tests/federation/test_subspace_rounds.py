"""Whole federations in a shared subspace: both exchanges, bytes, feedback, lost clients, resumption."""

import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.sums import dense
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError, FederationStoppedError, InterruptedRunError
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.contributions import Contribution, summed
from fedsmoothlora.federation.engines.in_process import InProcess
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.settings import UploadSettings
from fedsmoothlora.federation.simulation import ClientReply, Simulation
from fedsmoothlora.federation.uploads import ReplySpec, check_replies
from fedsmoothlora.methods.base import Start, Upload
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA
from fedsmoothlora.runs import session
from fedsmoothlora.runs.check import estimate
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.runs.session import run

Federation = Callable[..., Simulation]
SUBSPACE: dict[str, Any] = {"method.exchange": "subspace", "method.zeta": 0.0}
# Two clients of three in every round, so that each misses rounds and comes back.
PARTIAL = {**SUBSPACE, "participation.clients": 2, "training.rounds": 5}


def quiet() -> Console:
    return Console(quiet=True)


class Notes(Callback):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_note(self, text: str) -> None:
        self.texts.append(text)


class Watched(InProcess):
    """The engine of one process; it can lose clients, and shows messages and replies."""

    def __init__(self) -> None:
        self.messages: dict[tuple[int, int, str], Message] = {}
        self.replies: dict[tuple[int, int, str], Reply] = {}
        self.lost: set[tuple[int, int, str]] = set()

    def train(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterator[ClientReply]:
        def seen(client: str) -> Message:
            made = message(client)
            self.messages[made.round, made.exchange, client] = made
            return made

        for answer in super().train(simulation, clients, seen, callback):
            key = answer.reply.round, answer.reply.exchange, answer.client
            self.replies[key] = answer.reply
            if key not in self.lost:
                yield answer


def watched(simulation: Simulation) -> Watched:
    simulation.engine = engine = Watched()
    return engine


def totals(simulation: Simulation, callback: Callback | None = None) -> list[dict[str, float]]:
    """Metrics of the server and the global model in every round."""
    return [
        {metric.name: metric.value for metric in record.metrics if metric.client is None}
        for record in run_rounds(simulation, callback or Callback())
    ]


def changes_of(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, str], Tensor]:
    """The change of every client in a round, ``B A - GA``, by round and layer, in the clients' order."""
    found: dict[tuple[int, str], list[Tensor]] = {}
    real = FedSmoothLoRA.upload

    def upload(self: FedSmoothLoRA, trained: Any, start: Start, client: Any) -> Upload:
        for name, lora in trained.items():
            found.setdefault((client.round, name), []).append((lora + start.shift[name]).dense().double())
        return real(self, trained, start, client)

    monkeypatch.setattr(FedSmoothLoRA, "upload", upload)
    return found  # type: ignore[return-value]


def weights_of(simulation: Simulation, clients: Sequence[str]) -> list[float]:
    counts = [len(simulation.clients[client]) for client in clients]
    return [count / sum(counts) for count in counts]


def residual(state: ClientState, round: int, name: str) -> Tensor:
    return dense(state.uploads[round][f"feedback:{name}"]).double()


# -- what a run computes


def test_updates_and_residuals_make_up_all_changes(
    toy_federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = changes_of(monkeypatch)
    simulation = toy_federation({**SUBSPACE, "training.rounds": 3})
    totals(simulation)
    p = weights_of(simulation, list(simulation.clients))
    for name in simulation.server.layers:
        merged = sum(LowRank.of(update[name]).dense().double() for update in simulation.server.updates)
        left = sum(
            share * residual(simulation.states.load(client, Callback()), 2, name)
            for share, client in zip(p, simulation.clients, strict=True)
        )
        wanted = sum(share * changes[t, name][place] for t in range(3) for place, share in enumerate(p))
        torch.testing.assert_close(merged + left, wanted, rtol=1e-4, atol=1e-5)
        assert float(left.norm()) > 1e-3 * float(wanted.norm())


def test_a_round_projects_the_mean_on_the_subspace_that_it_chose(
    toy_federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``S = P P^+ mean`` with ``P`` a basis of ``mean Q_0``, computed densely."""
    changes = changes_of(monkeypatch)
    simulation = toy_federation({**SUBSPACE, "training.rounds": 1})
    totals(simulation)
    p = weights_of(simulation, list(simulation.clients))
    for name, update in simulation.server.updates[0].items():
        mean = sum(share * change for share, change in zip(p, changes[0, name], strict=True))
        Q = simulation.server.initial_state.orthonormal(name).A.mT.double()
        P = torch.linalg.qr(mean @ Q).Q
        torch.testing.assert_close(LowRank.of(update).dense().double(), P @ P.mT @ mean, rtol=1e-3, atol=1e-5)


def test_the_server_uses_sums_only(toy_federation: Federation) -> None:
    """Adding to one client's contributions what is taken from another's changes nothing."""
    simulation = toy_federation({**SUBSPACE, "training.rounds": 1})
    engine = watched(simulation)
    real = engine.train

    def shifted(*arguments: Any) -> Iterator[ClientReply]:
        for answer in real(*arguments):
            sign = {"0": 1.0, "1": -1.0}.get(answer.client, 0.0)
            moved = {
                part: {name: value + 0.25 * sign for name, value in getattr(answer.reply, part).items()}
                for part in ("sent", "head")
            }
            yield replace(answer, reply=replace(answer.reply, **moved))

    engine.train = shifted  # type: ignore[method-assign]
    totals(simulation)
    plain = toy_federation({**SUBSPACE, "training.rounds": 1})
    totals(plain)
    for name, update in plain.server.updates[0].items():
        right, found = LowRank.of(update).dense(), LowRank.of(simulation.server.updates[0][name]).dense()
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5)
    for name, value in plain.server.head.items():
        torch.testing.assert_close(simulation.server.head[name], value, rtol=1e-4, atol=1e-5)


def test_a_sum_has_the_weight_of_its_parts() -> None:
    parts = [
        Contribution(weight=w, tensors={"w": w * torch.full((2,), x), "head:b": torch.zeros(1)})
        for w, x in ((3.0, 1.0), (1.0, 5.0))
    ]
    total = summed(parts)
    assert total.means().keys() == {"w"}
    assert total.means()["w"].tolist() == [2.0, 2.0]
    assert parts[0].tensors["w"].tolist() == [3.0, 3.0]
    with pytest.raises(ValueError, match="no weights"):
        summed([])


# -- bytes


@pytest.mark.parametrize("head", ["full", "lora"])
def test_both_exchanges_have_the_bytes_of_a_product(
    head: str, toy_federation: Federation, toy_table: dict[str, Any]
) -> None:
    chosen = {**SUBSPACE, "model.head": head, **({"lora.head_r": 1} if head == "lora" else {})}
    simulation = toy_federation(chosen)
    found = totals(simulation)
    layers, size = simulation.server.layers.values(), sum(v.nbytes for v in simulation.server.head.values())
    one = sum(4 * layer.rank * (layer.m + layer.n) for layer in layers) + size
    assert [round["bytes_up"] for round in found[1:]] == [3 * one] * 3
    # The first basis is seeded, and nothing is merged yet: only P is sent.
    first = sum(4 * layer.rank * layer.m for layer in layers) + size
    assert [round["bytes_down"] for round in found[1:]] == [3 * first, 3 * one, 3 * one]
    costs = estimate(plan(read(toy_table, chosen)))
    assert (3 * costs.up, 3 * costs.down) == (found[-1]["bytes_up"], found[-1]["bytes_down"])


def test_only_who_missed_a_round_is_sent_the_basis(toy_federation: Federation) -> None:
    simulation = toy_federation(PARTIAL)
    engine = watched(simulation)
    found = totals(simulation)
    accepted: dict[str, int] = {}
    seen = set()
    for (t, exchange, client), message in engine.messages.items():
        if exchange:
            assert message.left.keys() == simulation.server.layers.keys()
            assert message.nbytes == sum(value.nbytes for value in message.left.values())
            continue
        holds = t > 0 and accepted.get(client) == t - 1
        assert bool(message.right) == holds
        assert bool(message.basis) == (t > 0 and not holds)
        assert bool(message.updates) == (t > 0 and not holds)
        seen.add((t > 0, holds))
        accepted[client] = t
    assert seen == {(False, False), (True, True), (True, False)}
    for t in range(5):
        sent = sum(one.nbytes for (round, _, _), one in engine.messages.items() if round == t)
        up = sum(one.nbytes for (round, _, _), one in engine.replies.items() if round == t)
        assert (found[t + 1]["bytes_down"], found[t + 1]["bytes_up"]) == (sent, up)


def test_a_basis_that_machines_would_compute_differently_is_sent(toy_federation: Federation) -> None:
    simulation = toy_federation({**SUBSPACE, "training.rounds": 2})
    engine = watched(simulation)
    rounds = run_rounds(simulation, Callback())
    next(rounds), next(rounds)
    server, name = simulation.server, next(iter(simulation.server.layers))
    last = LowRank.of(server.updates[0][name])
    server.updates[0] = {**server.updates[0], name: LowRank(last.B, torch.zeros_like(last.A))}
    next(rounds)
    for client in simulation.clients:
        assert engine.messages[1, 0, client].basis.keys() == {name}


# -- clients that are lost


def test_a_client_lost_between_the_exchanges_keeps_its_residual(toy_federation: Federation) -> None:
    simulation = toy_federation({**SUBSPACE, "training.rounds": 3})
    engine = watched(simulation)
    engine.lost = {(1, 1, "1")}
    found = totals(simulation)
    assert [round.get("clients") for round in found] == [None, 3, 2, 3]
    message = engine.messages[2, 0, "1"]
    assert message.accepted_round == 0
    assert message.basis
    assert not message.right
    # Its first contribution is part of P.
    server, name = simulation.server, next(iter(simulation.server.layers))
    mean = summed(Contribution.of(engine.replies[1, 0, client]) for client in "012").means()[name]
    P = engine.messages[1, 1, "0"].left[name]
    torch.testing.assert_close(P @ (P.mT @ mean), mean, rtol=1e-4, atol=1e-6)
    assert server.accepted == {"0": 2, "1": 2, "2": 2}


def test_the_residual_belongs_to_the_last_accepted_upload(
    toy_federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = changes_of(monkeypatch)
    simulation = toy_federation({**SUBSPACE, "training.rounds": 3})
    engine = watched(simulation)
    engine.lost = {(1, 1, "1")}
    rounds = run_rounds(simulation, Callback())
    next(rounds), next(rounds)
    name = next(iter(simulation.server.layers))
    before = residual(simulation.states.load("1", Callback()), 0, name)
    next(rounds), next(rounds)
    state = simulation.states.load("1", Callback())
    pending = dense(state.uploads[2][f"pending:0:{name}"]).double()
    torch.testing.assert_close(pending, before + changes[2, name][1], rtol=1e-4, atol=1e-6)


def test_a_client_without_its_state_takes_part_like_a_new_one(toy_federation: Federation) -> None:
    simulation = toy_federation({**SUBSPACE, "training.rounds": 3})
    notes = Notes()
    for record in run_rounds(simulation, notes):
        if record.round == 1:
            simulation.states.save("0", ClientState())
        if record.round > 1:
            assert record.value("clients") == 3
    assert any("client 0: its state from round 1 is lost" in text for text in notes.texts)


def test_a_client_that_lost_what_it_trained_sits_out(toy_federation: Federation) -> None:
    simulation = toy_federation({**SUBSPACE, "training.rounds": 2})
    real, notes = simulation.server.begin_second_exchange, Notes()

    def begin(*arguments: Any) -> None:
        real(*arguments)
        if simulation.server.round == 1:
            simulation.states.save("2", ClientState())

    simulation.server.begin_second_exchange = begin  # type: ignore[method-assign]
    found = totals(simulation, notes)
    assert [round.get("clients") for round in found] == [None, 3, 2]
    assert any("client 2 sits out round 2: what it trained" in text for text in notes.texts)


def test_a_round_with_too_few_second_uploads_is_repeated_with_other_clients(
    toy_federation: Federation,
) -> None:
    simulation = toy_federation({**PARTIAL, "uploads.min_clients": 2, "participation.clients": 2})
    engine, notes = watched(simulation), Notes()
    simulation.uploads = UploadSettings(min_clients=1)
    engine.lost = {(1, 1, client) for client in "012"}
    with pytest.raises(FederationStoppedError, match="round 2"):
        totals(simulation, notes)
    assert any("0 of 2 uploads can be used" in text for text in notes.texts)
    attempts = {key for key in engine.messages if key[0] == 1 and key[1] == 0}
    assert len(attempts) == 3


# -- resumption and processes


def assert_same_bits(one: Path, other: Path) -> None:
    for path in sorted([*(one / "updates").iterdir(), one / "model" / "model.safetensors"]):
        right, got = load_file(path), load_file(other / path.relative_to(one))
        assert right.keys() == got.keys()
        assert all(torch.equal(value, got[name]) for name, value in right.items())


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 4])
def test_a_run_stopped_in_a_second_exchange_goes_on_to_the_bit(
    at: int, toy_table: dict[str, Any], tmp_path: Path
) -> None:
    """Its first uploads are kept, and so are the second ones that had come."""
    config = read(toy_table, {**PARTIAL, "training.rounds": 3})
    whole = run(config, out=tmp_path / "whole", console=quiet()).folder
    real, answered = Learner.answer_second, 0

    def answer_second(self: Learner, *arguments: Any) -> Any:
        nonlocal answered
        answered += 1
        if answered == at:
            raise InterruptedRunError("stopped by the test")
        return real(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "answer_second", answer_second)
        with pytest.raises(InterruptedRunError):
            run(config, out=tmp_path / "parted", console=quiet())
        trained: list[Any] = []
        visit = Learner.visit
        patch.setattr(Learner, "visit", lambda *given: trained.append(given[1]) or visit(*given))
        parted = run(config, resume=tmp_path / "parted", console=quiet()).folder
    assert len(trained) == 2 * (3 - 1 - (at - 1) // 2)
    assert answered == 3 * 2 + 1
    assert_same_bits(whole, parted)


@pytest.mark.slow
def test_a_run_stopped_between_rounds_goes_on_to_the_bit(toy_table: dict[str, Any], tmp_path: Path) -> None:
    config = read(toy_table, {**PARTIAL, "training.rounds": 4})
    whole = run(config, out=tmp_path / "whole", console=quiet()).folder
    real, stopped = session.Checkpoints.save, []

    def save(self: Any, server: Any, *rest: Any) -> None:
        real(self, server, *rest)
        if server.round == 2 and not stopped:
            stopped.append(True)
            raise InterruptedRunError("stopped by the test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.Checkpoints, "save", save)
        with pytest.raises(InterruptedRunError):
            run(config, out=tmp_path / "parted", console=quiet())
    assert_same_bits(whole, run(config, resume=tmp_path / "parted", console=quiet()).folder)


@pytest.mark.slow
def test_several_processes_give_the_same_bits_in_a_subspace(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    one, other = (
        run(
            read(toy_table, {**PARTIAL, "training.rounds": 3, "machine.jobs": jobs}),
            out=tmp_path / str(jobs),
            console=quiet(),
        ).folder
        for jobs in (1, 2)
    )
    assert_same_bits(one, other)


@pytest.mark.release
def test_a_subspace_learns_as_well_as_products(toy_federation: Federation) -> None:
    """On the textures, over five seeds: mean accuracies after six rounds within .05 of each other."""

    def accuracy(**chosen: Any) -> float:
        found = [
            totals(toy_federation({"training.rounds": 6, "seed": seed, "method.zeta": 0.0, **chosen}))[-1]
            for seed in range(5)
        ]
        return sum(one["accuracy"] for one in found) / len(found)

    product, subspace = (
        accuracy(**{"method.client_feedback": True}),
        accuracy(**{"method.exchange": "subspace"}),
    )
    assert subspace == pytest.approx(product, abs=0.05)


# -- refused


def uploads_of(simulation: Simulation, exchange: int) -> tuple[list[Reply], ReplySpec]:
    """The replies of an exchange in a run of one round, and their specification."""
    engine, spec, real = watched(simulation), [], simulation.server.reply_spec

    def reply_spec(*arguments: Any, **named: Any) -> ReplySpec:
        spec.append(real(*arguments, **named))
        return spec[-1]

    simulation.server.reply_spec = reply_spec  # type: ignore[method-assign]
    totals(simulation)
    return [one for key, one in engine.replies.items() if key[1] == exchange], spec[exchange]


@pytest.mark.parametrize("exchange", [0, 1])
def test_damaged_uploads_are_refused_in_both_exchanges(exchange: int, toy_federation: Federation) -> None:
    replies, spec = uploads_of(toy_federation({**SUBSPACE, "training.rounds": 1}), exchange)
    assert len(check_replies(replies, spec, UploadSettings()).accepted) == 3
    good, name = replies[0], next(iter(replies[0].sent))
    value = good.sent[name]
    assert isinstance(value, Tensor)

    def sends(other: object) -> Reply:
        return replace(good, sent={**good.sent, name: other})  # type: ignore[dict-item]

    damaged = {
        "not finite": sends(value * float("nan")),
        "shape": sends(value[1:]),
        "expected a dense tensor": sends(LowRank(value, value.mT)),
        "torch.float64": sends(value.double()),
        "times the median": replace(good, sent={key: 1000 * one for key, one in good.sent.items()}),
        "lacks layer": replace(good, sent={}),
        "its reply is for exchange": replace(good, exchange=1 - exchange),
        "number of training samples": replace(good, samples=good.samples + 1),
    }
    if exchange:
        head = good.head.items()
        damaged["head tensor"] = replace(good, head={key: one * float("inf") for key, one in head})
        damaged["head's change"] = replace(good, head={key: 1e6 * one for key, one in head})
    else:
        damaged["unknown tensor"] = replace(good, head={"extra": torch.zeros(1)})
    for reason, reply in damaged.items():
        [(_, found)] = check_replies([reply, *replies[1:]], spec, UploadSettings()).refused
        assert reason in found


def test_norms_are_compared_without_the_weights(toy_federation: Federation) -> None:
    """A client with many rows is not refused for them."""
    replies, spec = uploads_of(toy_federation({**SUBSPACE, "training.rounds": 1}), 1)
    spec = replace(spec, clients={**spec.clients, "0": 100 * spec.clients["0"]})
    many = replace(
        replies[0],
        samples=100 * replies[0].samples,
        sent={name: 100 * value for name, value in replies[0].sent.items()},
        head={name: 100 * value for name, value in replies[0].head.items()},
    )
    assert len(check_replies([many, *replies[1:]], spec, UploadSettings()).accepted) == 3


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ({"method.zeta": 0.5}, "needs method.zeta = 0"),
        ({"method.client_feedback": True}, "method.client_feedback = true does nothing"),
        ({"method.server_feedback": True}, "method.server_feedback = true does nothing"),
        ({"method.server_rank": 4}, "method.server_rank = 4"),
        ({"method.server_rank": "energy:0.9"}, "method.server_rank = 'energy:0.9'"),
        ({"method.layer_ranks": "energy"}, "method.layer_ranks"),
        ({"method.gradient_aligned": "shared"}, "not the gradient of each client"),
        ({"transport.bits": 16}, "transport.bits = 16"),
        ({"transport.bits": 4}, "scales that all clients share"),
        ({"lora.client_ranks": [2, 1, 1]}, "lora.client_ranks"),
        ({"participation.buffer": 2}, "participation.buffer"),
        ({"server.aggregation": "geometric_median"}, "compares single uploads"),
        ({"server.aggregation": "median"}, "compares single uploads"),
        ({"uploads.max_weight": 0.5}, "uploads.max_weight"),
        ({"uploads.clip_to_median": True}, "uploads.clip_to_median"),
        ({"server.optimizer": "momentum"}, "server.optimizer"),
        (
            {
                "privacy.unit": "client",
                "privacy.noise_multiplier": 1.0,
                "privacy.clip_norm": 1.0,
                "privacy.delta": 1e-3,
            },
            "two releases",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_need_single_uploads_are_refused_with_the_reason(
    chosen: Mapping[str, Any], reason: str, toy_federation: Federation
) -> None:
    with pytest.raises(ConfigError, match=reason.replace(".", r"\.")):
        toy_federation({**SUBSPACE, **chosen})


def test_a_residual_is_cut_off_at_the_feedback_rank(toy_federation: Federation) -> None:
    simulation = toy_federation({**SUBSPACE, "method.feedback_rank": 1, "training.rounds": 2})
    cut = [m.value for r in run_rounds(simulation, Callback()) for m in r.metrics if m.name == "feedback_cut"]
    assert len(cut) == 6
    kept = simulation.states.load("0", Callback()).uploads[1]
    assert all(value.rank == 1 for name, value in kept.items() if name.startswith("feedback:"))  # type: ignore[union-attr]


def test_sample_level_privacy_gives_all_clients_one_weight(toy_federation: Federation) -> None:
    private = {
        "privacy.unit": "sample",
        "lora.dropout": 0.0,
        "privacy.noise_multiplier": 1.0,
        "privacy.clip_norm": 1.0,
        "privacy.delta": 1e-3,
        "privacy.seed": 1,
        "privacy.sample_rate": 0.2,
        "training.steps": 2,
        "method.gradient_aligned": "random",
        "training.rounds": 1,
        "training.momentum": 0.0,
        "training.max_grad_norm": None,
    }
    simulation = toy_federation({**SUBSPACE, **private})
    engine = watched(simulation)
    totals(simulation)
    assert {reply.samples for reply in engine.replies.values()} == {1}
    assert not any(
        name.startswith(("train", "seconds")) for one in engine.replies.values() for name in one.metrics
    )


def test_the_pages_example_runs(toy_table: dict[str, Any], tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "subspace.md").read_text(encoding="utf-8")
    table = tomllib.loads(page.partition("```toml\n")[2].partition("```")[0])
    assert read(table).method.two_exchanges
    toy = {"model": toy_table["model"], "data": toy_table["data"]}
    few = {"training.rounds": 1, "method.calibration_batches": 1}
    found = run({**table, **toy}, few, out=tmp_path / "run", console=quiet())
    assert {line["round"] for line in found.metrics} == {0, 1}
