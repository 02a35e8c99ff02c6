"""Partial participation: every message, match and start against dense matrices in float64."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from fedsmoothlora.algebra.alignment import round_matching, start_factors, upload_product
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import DivergedError, FederationStoppedError, InterruptedRunError
from fedsmoothlora.federation import rounds as rounds_module
from fedsmoothlora.federation.catch_up import catch_up
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.participation import sample_clients
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.server import Server
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.methods import ClientView, Layer, Method, Products, Start
from fedsmoothlora.runs.session import run
from fedsmoothlora.storage.client_store import StoredStates

Make = Callable[..., Simulation]
Dense = dict[str, Tensor]
RANK = 2


def dense(value: LowRank | Tensor) -> Tensor:
    return value.double() if isinstance(value, Tensor) else value.B.double() @ value.A.double()


def densely(update: Mapping[str, LowRank | Tensor]) -> Dense:
    return {name: dense(value) for name, value in update.items()}


def close(found: Tensor, wanted: Tensor, size: float | None = None) -> None:
    """Equal up to float32's rounding of matrices of that size."""
    size = float(wanted.norm()) if size is None else size
    assert float((found - wanted).norm()) <= 2e-5 * size + 1e-7


def assert_truncates(found: LowRank, matrix: Tensor, rank: int) -> None:
    """``found`` is a best approximation of that rank: as near as the singular values allow."""
    assert found.rank <= rank
    best = float(torch.linalg.svdvals(matrix)[rank:].norm())
    assert float((dense(found) - matrix).norm()) <= best + 2e-5 * float(matrix.norm())


@dataclass
class Visit:
    """The message, start and reply of one client in one round."""

    client: str
    message: Message
    match: Dense = field(default_factory=dict)  # R
    weights_at_match: Dense = field(default_factory=dict)
    received: Dense = field(default_factory=dict)
    kept_round: int = -1
    start: Start | None = None
    trained_on: Dense = field(default_factory=dict)
    started_from: Dense = field(default_factory=dict)
    trained: Products = field(default_factory=dict)
    reply: Reply | None = None  # as it was before anything became of it; None where the client diverged

    @property
    def round(self) -> int:
        return self.message.round

    @property
    def has_no_match(self) -> bool:
        return all(not bool(match.any()) for match in self.match.values())


class Recorded(Callback):
    """Replaces the learner of a federation by one that records every visit.

    Args:
        federation: the federation.
        reply: changes a reply on its way to the server; may raise ``DivergedError``.
    """

    def __init__(self, federation: Simulation, reply: Callable[[Reply], Reply] = lambda reply: reply) -> None:
        self.federation, self.change = federation, reply
        self.visits: list[Visit] = []
        self.notes: list[str] = []
        self.records: list[RoundRecord] = []
        learner = federation.learner
        self.learner = replace(learner, method=self._recording(learner.method))
        backbone = learner.model.backbone
        self.pretrained = {name: backbone.weight(name).double() for name in learner.model.layers}
        federation.learner = self  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.learner, name)

    def run(self, rounds: int | None = None) -> list[RoundRecord]:
        """Run that many rounds, or all that are left."""
        resumed = bool(self.records)
        for record in run_rounds(self.federation, self, resumed=resumed):
            self.records.append(record)
            if record.round == rounds:
                break
        return self.records

    def of(self, round: int, client: str | None = None) -> list[Visit]:
        return [v for v in self.visits if v.round == round and client in (None, v.client)]

    def visit(self, client: str, data: Any, message: Message, *rest: Any) -> Any:
        self.visits.append(Visit(client, message))
        visited = self.learner.visit(client, data, message, *rest)
        changed = replace(visited, reply=self.change(visited.reply))
        self.visits[-1].reply = visited.reply
        return changed

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def on_client_step(self, client: str, loss: float) -> None:
        if not self.visits[-1].trained_on:
            self.visits[-1].trained_on = self._weights()

    def _weights(self) -> Dense:
        return {name: module.weight.detach().double() for name, module in self.model.modules.items()}

    def _recording(self, method: Method) -> Method:
        """The same method, whose starts and uploads are recorded."""
        recorder = self

        class Recording(type(method)):  # type: ignore[misc]
            def start(self, client: ClientView) -> Start:
                return recorder._start(client, super().start)

            def upload(self, trained: Products, start: Start, client: ClientView) -> Any:
                recorder.visits[-1].trained = trained
                return super().upload(trained, start, client)

        return Recording(**{part.name: getattr(method, part.name) for part in fields(method)})

    def _start(self, view: ClientView, start_of: Callable[[ClientView], Start]) -> Start:
        visit, gradients = self.visits[-1], view.gradients

        def recorded(at: Products) -> Mapping[str, Tensor]:
            visit.match = densely(at)
            found = gradients(at)
            visit.weights_at_match = self._weights()
            return found

        start = start_of(replace(view, gradients=recorded))
        visit.received, visit.kept_round, visit.start = densely(view.received), view.kept_round, start
        return start


def check_protocol(
    recorded: Recorded,
    *,
    rho: float = 0.5,
    zeta: Callable[[int], float] = lambda t: 1.0,
    counts: Callable[[Visit], bool] = lambda visit: True,
) -> None:
    """Every visit against the method's formulas, with dense matrices and every sum written out."""
    server = recorded.federation.server
    layers, scale = server.layers, next(iter(server.layers.values())).scale
    S = [densely(update) for update in server.updates]
    U: dict[str, dict[int, Dense]] = {}  # by client and round, what counted
    reached: dict[str, int] = {}  # by client, how many updates it was sent
    ledger: dict[str, Dense] = {}  # by client, their sum
    accepted: dict[int, list[Visit]] = {}

    def total(name: str, first: int, last: int) -> Tensor:
        zero = torch.zeros_like(recorded.pretrained[name])
        return sum((S[j][name] for j in range(first, last)), zero)

    for visit in recorded.visits:
        t, client, message = visit.round, visit.client, visit.message
        mine = U.setdefault(client, {})
        tau = max(mine, default=-1)
        assert (message.accepted_round, visit.kept_round) == (tau, tau)
        # What the message brings is exactly what the client lacks.
        assert message.first_update == reached.get(client, 0)
        news = densely(message.updates)
        assert news.keys() == (layers.keys() if message.first_update < t else set())
        sums = dict(
            ledger.get(client) or {name: torch.zeros_like(w) for name, w in recorded.pretrained.items()}
        )
        for name in layers:
            if name in news:
                sums[name] = sums[name] + news[name]
                close(news[name], total(name, message.first_update, t))
            close(sums[name], total(name, 0, t))
        assert visit.start is not None
        for name in layers:
            W = recorded.pretrained[name] + scale * total(name, 0, t)
            size = float(W.norm())
            if tau < 0:  # a newcomer
                assert not visit.match[name].any()
                assert not visit.received
                R = torch.zeros_like(W)
            else:
                close(visit.received[name], total(name, tau, t), size)
                R = zeta(t) * rho ** (t - 1 - tau) * (mine[tau][name] - total(name, tau, t))
                close(visit.match[name], R, float(mine[tau][name].norm() + total(name, tau, t).norm()))
            close(visit.weights_at_match[name], W + scale * R, size)
            shift, lora = dense(visit.start.shift[name]), dense(visit.start.lora[name])
            close(visit.trained_on[name], W + scale * shift, size)
            # Truncated start: shift = -GA, LoRA = SVD_r(GA + R), or GA's own factors.
            assert_truncates(visit.start.lora[name], R - shift, layers[name].rank)
            if not R.any():
                close(lora, -shift)
            if visit.reply is not None:  # SVD_r(B A + shift)
                assert_truncates(
                    visit.reply.sent[name], dense(visit.trained[name]) + shift, layers[name].rank
                )
        if visit.reply is None:
            continue
        reached[client], ledger[client] = t, sums
        if counts(visit):
            mine[t] = densely(visit.reply.sent)
            accepted.setdefault(t, []).append(visit)
    assert sorted(accepted) == list(range(len(S)))
    for t, update in enumerate(server.updates):
        samples = [visit.reply.samples for visit in accepted[t]]
        for name, layer in layers.items():
            mean = sum(
                n / sum(samples) * U[visit.client][t][name]
                for n, visit in zip(samples, accepted[t], strict=True)
            )
            assert_truncates(update[name], mean, layer.rank)
    assert server.accepted == {client: max(mine) for client, mine in U.items() if mine}
    check_figures(recorded, counts)


def check_figures(recorded: Recorded, counts: Callable[[Visit], bool]) -> None:
    for record in recorded.records[1:]:
        visits = recorded.of(record.round - 1)
        assert record.value("bytes_down") == sum(visit.message.nbytes for visit in visits)
        replied = [visit.reply for visit in visits if visit.reply is not None]
        assert record.value("bytes_up") == sum(reply.nbytes for reply in replied)
        assert record.value("clients") == sum(counts(visit) for visit in visits)
        assert record.value("left_out") == sum(not counts(visit) for visit in visits)


def take_turns(monkeypatch: pytest.MonkeyPatch, schedule: Sequence[Sequence[int]]) -> None:
    """Let the clients ``schedule[t]`` take part in round ``t``, and none in a repeated round."""

    def scheduled(
        clients: list[str], count: int, seed: int, round: int, attempt: int, asked: Any
    ) -> list[str]:
        return [] if attempt else [clients[i] for i in schedule[round]]

    monkeypatch.setattr(rounds_module, "sample_clients", scheduled)


def partly(clients: int, a_round: int, **more: Any) -> dict[str, Any]:
    return {
        "partition": {"kind": "dirichlet", "clients": clients, "alpha": 1.0, "min_size": 4},
        "participation.clients": a_round,
        "training.steps": 2,
        "training.lr": 0.05,
        **{key.replace("__", "."): value for key, value in more.items()},
    }


# --- the method, step 1, over whole federations


@pytest.mark.parametrize("staleness", [0.0, 0.5, 1.0])
def test_matches_messages_and_starts_follow_the_dense_formulas(
    toy_federation: Make, staleness: float
) -> None:
    recorded = Recorded(toy_federation(partly(5, 2, training__rounds=8, method__staleness=staleness)))
    recorded.run()
    check_protocol(recorded, rho=staleness)
    missed = {visit.round - 1 - visit.kept_round for visit in recorded.visits if visit.kept_round >= 0}
    assert {0, 1, 2} <= missed
    for visit in recorded.visits:
        stale = staleness == 0 and visit.round - 1 - visit.kept_round > 0
        assert visit.has_no_match == (visit.kept_round < 0 or stale)


def test_zeta_depends_on_the_round_of_the_visit_and_not_of_the_upload(toy_federation: Make) -> None:
    options = {"method__zeta": 0.8, "method__zeta_schedule": "cosine", "method__zeta_floor": 0.2}
    recorded = Recorded(toy_federation(partly(4, 2, training__rounds=6, **options)))
    recorded.run()
    check_protocol(recorded, zeta=lambda t: 0.2 + 0.3 * (1 + math.cos(math.pi * t / 6)))


@pytest.mark.parametrize("staleness", [0.5, 1.0])
def test_long_absences_and_late_newcomers(
    toy_federation: Make, monkeypatch: pytest.MonkeyPatch, staleness: float
) -> None:
    """Client 0 misses 13 rounds, client 1 first takes part after 13 rounds, client 2 is in every round."""
    schedule = [[0, 2], *[[2, 3]] * 6, [2], [2, 4], *[[2, 3]] * 4, [1, 2], [0, 1, 2], [0, 4]]
    take_turns(monkeypatch, schedule)
    rounds = len(schedule)
    recorded = Recorded(toy_federation(partly(5, 2, training__rounds=rounds, method__staleness=staleness)))
    recorded.run()
    assert [[int(visit.client) for visit in recorded.of(t)] for t in range(rounds)] == schedule
    check_protocol(recorded, rho=staleness)
    (back,) = recorded.of(14, "0")
    assert (back.kept_round, back.message.first_update) == (0, 0)
    assert all(isinstance(value, Tensor) for value in back.message.updates.values())  # dense is smaller
    assert not back.has_no_match


# --- section 3: what the algebra says of returning clients


def test_untruncated_returning_clients_start_at_their_own_last_weights(
    toy_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are 32 x 32 and the rank is 32, so that nothing is truncated."""
    schedule = [[0, 1], [1, 2], [2, 3], [0, 3], [1, 2], [1, 3], [0, 2]]
    take_turns(monkeypatch, schedule)
    federation = toy_federation(
        partly(4, 2, training__rounds=7, method__staleness=1.0, method__gradient_aligned="none")
        | {"lora.r": 32, "lora.alpha": 16, "lora.dropout": 0.0}
    )
    recorded = Recorded(federation)
    recorded.run()
    model, last = federation.learner.model, {}
    returned = 0
    for visit in recorded.visits:
        assert visit.start is not None
        for name, layer in model.layers.items():
            begins = visit.trained_on[name] + layer.scale * dense(visit.start.lora[name])
            if (visit.client, name) in last:
                close(begins, last[visit.client, name])
                missed = last[visit.client, name] - recorded.pretrained[name]
                assert float(missed.norm()) > 1e-3  # 50 times what `close` lets pass
                returned += 1
            last[visit.client, name] = visit.trained_on[name] + layer.scale * dense(visit.trained[name])
    assert returned == 10 * len(model.layers)


@pytest.mark.parametrize("start", ["truncated", "exact"])
def test_gradient_aligned_returning_clients_start_at_their_own_last_weights(start: Any) -> None:
    """Tested through `ClientState` and `Server` in float64, with invented training and GA."""
    m, n, s, generator = 6, 5, 0.5, torch.Generator().manual_seed(1)

    def any_product(rank: int) -> LowRank:
        B = torch.randn(m, rank, generator=generator, dtype=torch.float64)
        return LowRank(B, torch.randn(rank, n, generator=generator, dtype=torch.float64))

    server = bare_server(m, n, rank=5)
    states: dict[str, ClientState] = {}
    own: dict[str, Tensor] = {}
    W = torch.randn(m, n, generator=generator, dtype=torch.float64)
    returned = 0
    for t in range(12):
        replies = []
        for client in sample_clients("abcde", 2, 3, t, 0):
            message = server.message(client)
            state = states.get(client, ClientState()).after(message)
            match = LowRank.zeros(m, n, dtype=torch.float64)
            if message.accepted_round >= 0:
                received = state.received_since(message.accepted_round, t)
                assert received is not None
                upload = state.uploads[message.accepted_round]["w"]
                assert isinstance(upload, LowRank)
                match = round_matching(
                    upload, [received["w"]], 1.0, staleness=1.0, missed=t - 1 - message.accepted_round
                )
            lora, shift = start_factors(any_product(2), match, None, start)
            if client in own:
                torch.testing.assert_close(W + s * (lora + shift).dense(), own[client])
                returned += 1
            trained = lora + any_product(1)
            own[client] = W + s * (trained + shift).dense()
            sent = {"w": upload_product(trained, shift, None)}
            states[client] = state.with_upload(t, sent)
            replies.append(Reply(client=client, round=t, samples=1, sent=sent))
            server.delivered(replies[-1].client)
        W = W + s * server.aggregate(replies).merge["w"].dense()
    assert returned > 15


def bare_server(m: int, n: int, rank: int) -> Server:
    layer = Layer(name="w", m=m, n=n, rank=rank, scale=0.5, gradient_rank=min(m, n))
    config = read({"name": "x", "model": {"source": "x"}, "data": {"source": "x"}})
    origin = InitialState({"w": layer}, 0, lambda name: torch.zeros(m, n))
    return Server(method=config.method, layers={"w": layer}, initial_state=origin, rounds=99, head={})


fates = st.sampled_from(["counts", "counts", "counts", "refused", "reply lost", "diverged"])
rounds_of_fates = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from("abcd"), fates, max_size=4),
        # Then the server goes back: 1 to its newest checkpoint, 2 to the one before (the newest is damaged).
        st.sampled_from([0, 0, 0, 0, 1, 2]),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(story=rounds_of_fates, keep=st.integers(1, 3))
def test_after_any_loss_a_client_matches_its_last_accepted_upload(story: Any, keep: int) -> None:
    """Uploads are refused, replies are lost, clients diverge, and the server returns to a checkpoint."""
    m, n, generator = 4, 3, torch.Generator().manual_seed(0)
    server, states = bare_server(m, n, rank=1), dict.fromkeys("abcd", ClientState())
    counted: list[dict[str, LowRank]] = []  # by round: what the server accepted
    checkpoints: list[Any] = [(0, {}, {}, {})]  # the last ``keep`` ones

    for asked, back in story:
        t = server.round
        replies = []
        for client, fate in asked.items():
            message = server.message(client)
            state = states[client].after(message)
            tau = max((round for round in range(t) if client in counted[round]), default=-1)
            assert message.accepted_round == tau
            if tau >= 0:
                received = state.received_since(tau, t)
                assert received is not None
                wanted = sum(dense(server.updates[j]["w"]) for j in range(tau, t))
                torch.testing.assert_close(dense(received["w"]), wanted, atol=1e-5, rtol=1e-5)
                upload = state.uploads[tau]["w"]
                assert torch.equal(dense(upload), dense(counted[tau][client]))
            if fate == "diverged":
                continue
            sent = LowRank(torch.randn(m, 1, generator=generator), torch.randn(1, n, generator=generator))
            states[client] = state.with_upload(t, {"w": sent})
            reply = Reply(client=client, round=t, samples=1, sent={"w": sent})
            if fate != "reply lost":
                server.delivered(reply.client)
            if fate == "counts":
                replies.append(reply)
        if replies:
            server.aggregate(replies)
            counted.append({reply.client: reply.sent["w"] for reply in replies})
            checkpoints.append(deepcopy((server.round, server.received, server.accepted, server.samples)))
            del checkpoints[:-keep]
            server.oldest = checkpoints[0][2]
        if back:
            if back == 2 and len(checkpoints) > 1:
                checkpoints.pop()
            server.round, server.received, server.accepted, server.samples = deepcopy(checkpoints[-1])
            del server.updates[server.round :], counted[server.round :]
            server.oldest = {}


# --- what catching up costs


def test_missed_updates_are_sent_in_the_smallest_form_and_all_bytes_are_counted(
    toy_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every round has a new client, and one client returns after ever longer absences."""
    schedule = [[0], [0, 1], [2], [0, 3], [4], [5], [0, 6], [7], [8], [9], [0, 10], [11]]  # 12 rounds
    take_turns(monkeypatch, schedule)
    federation = toy_federation(partly(12, 2, training__rounds=12, partition__min_size=2))
    recorded = Recorded(federation)
    recorded.run()
    check_protocol(recorded)
    layers = federation.server.layers.values()
    head = sum(value.nbytes for value in federation.server.head.values())
    forms = set()
    for visit in recorded.visits:
        updates = visit.round - visit.message.first_update
        smallest = 0
        for layer in layers:
            q = RANK * updates
            ways = {
                "as they are": 4 * q * (layer.m + layer.n),
                "compressed": 4 * min(q, layer.m, layer.n) * (layer.m + layer.n),
                "dense": 4 * layer.m * layer.n,
            }
            smallest += min(ways.values()) if updates else 0
            if updates:
                forms.add(min(ways, key=ways.__getitem__))
        assert visit.message.nbytes == smallest + head
    assert forms == {"as they are", "dense"}
    back = [visit.round - visit.message.first_update for visit in recorded.visits if visit.client == "0"]
    assert back == [0, 1, 2, 3, 4]


def test_updates_in_the_same_directions_are_compressed() -> None:
    layer = Layer(name="w", m=64, n=64, rank=2, scale=1.0, gradient_rank=64)
    one = LowRank(torch.randn(64, 2), torch.randn(2, 64))
    message = catch_up([{"w": one}, {"w": one * -0.5}, {"w": one * 0.25}], {"w": layer})
    assert message["w"].nbytes <= 4 * 2 * 128


# --- clients that lose what they kept


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def to_another_run(folder: Path) -> None:
    """The same state, written by a client of another run."""
    kept = StoredStates(folder.parent, "this run").load(folder.name, Callback())
    StoredStates(folder.parent, "another run").save(folder.name, kept)


LOSSES: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder deleted": (shutil.rmtree, "is lost"),
    "upload flipped": (lambda folder: flip(min(folder.glob("upload-*"))), "SHA-256"),
    "upload truncated": (lambda folder: truncate(min(folder.glob("upload-*"))), "SHA-256"),
    "upload deleted": (lambda folder: min(folder.glob("upload-*")).unlink(), "cannot be read"),
    "updates flipped": (lambda folder: flip(next(folder.glob("updates-*"))), "SHA-256"),
    "state.json flipped": (lambda folder: flip(folder / "state.json"), "SHA-256"),
    "state.json truncated": (lambda folder: truncate(folder / "state.json"), "SHA-256"),
    "state.json emptied": (lambda folder: (folder / "state.json").write_bytes(b""), "SHA-256"),
    "another run's": (to_another_run, "another run"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_client_that_lost_its_state_continues_like_a_new_one_with_a_note(
    toy_federation: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loss: str
) -> None:
    # Client 0 trains in round 0, is refused in round 1 (so that it needs S^0 from its folder), loses its
    # state, and is back in rounds 3 and 4.
    take_turns(monkeypatch, [[0, 1], [0, 1], [1, 2], [0, 1], [0, 1]])
    federation = toy_federation(partly(3, 2, training__rounds=5))
    federation.server.experiment = "this run"
    federation.states = StoredStates(tmp_path, "this run")

    def refused_once(reply: Reply) -> Reply:
        return replace(reply, attempt=9) if (reply.client, reply.round) == ("0", 1) else reply

    recorded = Recorded(federation, refused_once)
    recorded.run(rounds=3)
    for name, update in recorded.of(1, "0")[0].message.updates.items():
        assert float(dense(update).norm()) > 0, name
    before = list(recorded.notes)
    damage, said = LOSSES[loss]
    damage(tmp_path / "0")
    records = recorded.run()

    notes = [note for note in recorded.notes[len(before) :] if "client 0" in note]
    assert any(said in note for note in notes)
    assert notes[-1] == (
        "client 0: its state from round 1 is lost; it takes part like a new client, without round matching"
    )
    assert notes.count(notes[-1]) == 1
    (back,), (again,) = recorded.of(3, "0"), recorded.of(4, "0")
    assert back.message.accepted_round == 0
    assert back.has_no_match
    assert back.kept_round == -1
    assert not recorded.of(3, "1")[0].has_no_match
    # From then on it is a client like any other.
    assert (again.message.accepted_round, again.kept_round) == (3, 3)
    S, U = densely(federation.server.updates[3]), densely(back.reply.sent)
    for name, match in again.match.items():
        close(match, U[name] - S[name], float(U[name].norm() + S[name].norm()))
    assert [record.value("clients") for record in records[4:]] == [2, 2]


def test_a_client_with_an_old_backup_does_not_match_an_outdated_upload(
    toy_federation: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    take_turns(monkeypatch, [[0, 1]] * 4)
    federation = toy_federation(partly(2, 2, training__rounds=4))
    federation.states = StoredStates(tmp_path / "clients", "")
    recorded = Recorded(federation)
    recorded.run(rounds=1)
    shutil.copytree(tmp_path / "clients" / "0", tmp_path / "backup")
    recorded.run(rounds=3)
    shutil.rmtree(tmp_path / "clients" / "0")
    shutil.copytree(tmp_path / "backup", tmp_path / "clients" / "0")
    recorded.run()
    assert recorded.of(3, "0")[0].has_no_match
    assert any("client 0: its state from round 3 is lost" in note for note in recorded.notes)


# --- rounds with too few uploads


def too_few(**more: Any) -> dict[str, Any]:
    return partly(6, 2, **{"uploads__min_clients": 2, "training__rounds": 4, **more})


def test_a_round_with_too_few_uploads_is_repeated_with_clients_that_were_not_asked(
    toy_federation: Make,
) -> None:
    """One client diverges in the first attempts of rounds 1 and 3, and both in round 3's second attempt."""
    lost = {(1, 0): 1, (3, 0): 1, (3, 1): 2}  # by round and attempt: how many diverge
    gone: dict[tuple[int, int], int] = {}

    def diverging(reply: Reply) -> Reply:
        key = reply.round, reply.attempt
        gone[key] = gone.get(key, 0) + 1
        if gone[key] <= lost.get(key, 0):
            raise DivergedError("for the test")
        return reply

    recorded = Recorded(toy_federation(too_few()), diverging)
    recorded.run()
    assert [record.round for record in recorded.records] == [0, 1, 2, 3, 4]
    last = {0: 0, 1: 1, 2: 0, 3: 2}
    for t, attempts in last.items():
        visits = recorded.of(t)
        assert [visit.message.attempt for visit in visits] == [a for a in range(attempts + 1) for _ in "12"]
        asked: list[str] = []
        for attempt in range(attempts + 1):
            now = [visit.client for visit in visits if visit.message.attempt == attempt]
            assert now == sample_clients([str(i) for i in range(6)], 2, 0, t, attempt, asked)
            asked += now
        assert len(set(asked)) == len(asked)
    repeats = [note for note in recorded.notes if "repeated with other clients" in note]
    assert [note[:28] for note in repeats] == [
        "round 2: 1 of 2 uploads can ",
        "round 4: 1 of 2 uploads can ",
        "round 4: 0 of 2 uploads can ",
    ]
    # A client that replied in a failed attempt has the updates, but its upload did not count.
    check_protocol(recorded, counts=lambda v: v.message.attempt == last[v.round])
    assert recorded.records[2].value("bytes_up") == 3 / 2 * recorded.records[1].value("bytes_up")


def test_draws_depend_only_on_seed_round_attempt_and_client(
    toy_federation: Make,
) -> None:
    class Rows:
        """Rows that record which batches were requested."""

        def __init__(self, examples: Any) -> None:
            self.examples, self.asked = examples, []

        def __len__(self) -> int:
            return len(self.examples)

        def batch(self, rows: Sequence[int]) -> Any:
            self.asked += rows
            return self.examples.batch(rows)

    drawn: dict[tuple[int, int, int, str], list[int]] = {}
    even = {"partition": {"kind": "iid", "clients": 3}, "training.rounds": 2}
    for seed in (0, 1):
        federation = toy_federation({**even, "seed": seed})
        data = federation.clients["0"]  # the same rows for all, so that only the seed differs
        for t in (0, 1):
            for attempt in (0, 1):
                for client in ("0", "1"):
                    for _ in range(2):
                        rows = Rows(data)
                        message = Message(round=t, attempt=attempt, head=federation.server.head)
                        federation.learner.visit(client, rows, message, ClientState(), Callback())
                        key = seed, t, attempt, client
                        assert drawn.setdefault(key, rows.asked) == rows.asked
    assert len({tuple(rows) for rows in drawn.values()}) == len(drawn) == 16


# --- uploads that are refused


def altered(reply: Reply, how: str) -> Reply:
    name = next(iter(reply.sent))
    product = reply.sent[name]
    if how == "round":
        return replace(reply, round=reply.round - 1)
    if how == "NaN":
        B = product.B.clone()
        B[3, 1] = math.nan
        return replace(reply, sent={**reply.sent, name: LowRank(B, product.A)})
    if how == "infinite head":
        return replace(reply, head={key: value / 0 for key, value in reply.head.items()})
    return replace(reply, sent={key: value * 1e4 for key, value in reply.sent.items()})


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("round", "its reply is for round 2; this is round 3"),
        ("NaN", "1 of 64 values are not finite"),
        ("infinite head", "values are not finite"),
        ("large", "10 times the median"),
    ],
)
def test_a_refused_upload_is_logged_left_out_and_never_matched(
    toy_federation: Make, monkeypatch: pytest.MonkeyPatch, how: str, reason: str
) -> None:
    """Client 0 is accepted in round 0, refused in rounds 2 and 3, and takes part in rounds 5 and 6."""
    take_turns(monkeypatch, [[0, 1, 2], [1, 2, 3], [0, 1, 2, 3], [0, 1, 2], [1, 2, 3], [0, 1, 3], [0, 1, 2]])
    refused = {("0", 2), ("0", 3)}
    recorded = Recorded(
        toy_federation(partly(4, 3, training__rounds=7)),
        lambda reply: altered(reply, how) if (reply.client, reply.round) in refused else reply,
    )
    recorded.run()
    said = [note for note in recorded.notes if "refused" in note]
    assert [note[:35] for note in said] == [f"round {t}: upload refused: client 0: " for t in (3, 4)]
    assert reason in said[0]
    counts = [record.value("refused") for record in recorded.records]
    assert counts == [None, *(int(t in (2, 3)) for t in range(7))]
    check_protocol(recorded, counts=lambda visit: (visit.client, visit.round) not in refused)
    taus = [visit.kept_round for visit in recorded.visits if visit.client == "0"]
    assert taus == [-1, 0, 0, 0, 5]


def test_refused_uploads_of_every_attempt_of_a_round_are_counted(toy_federation: Make) -> None:
    """Both uploads of round 0's first attempt are refused, and other clients repeat the round."""
    recorded = Recorded(
        toy_federation(partly(4, 2, training__rounds=1, uploads__min_clients=2)),
        lambda reply: altered(reply, "NaN") if reply.attempt == 0 else reply,
    )
    recorded.run()
    record = recorded.records[-1]
    assert (record.value("clients"), record.value("left_out"), record.value("refused")) == (2, 2, 2)


def test_a_reply_in_another_clients_name_does_not_change_what_that_client_is_sent(
    toy_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_turns(monkeypatch, [[0, 1], [1, 2], [1, 2], [0, 1]])

    def lying(reply: Reply) -> Reply:
        return replace(reply, client="0") if (reply.client, reply.round) == ("1", 2) else reply

    recorded = Recorded(toy_federation(partly(3, 2, training__rounds=4)), lying)
    recorded.run()
    assert any("client 0 was not asked" in n or "client 0: was not asked" in n for n in recorded.notes)
    (back,) = recorded.of(3, "0")
    assert back.message.first_update == 0
    assert not back.has_no_match


def test_a_reply_without_an_upload_is_refused(toy_federation: Make) -> None:
    recorded = Recorded(
        toy_federation(partly(3, 3, training__rounds=1)),
        lambda reply: replace(reply, sent=None) if reply.client == "0" else reply,  # type: ignore[arg-type]
    )
    recorded.run()
    assert recorded.records[-1].value("clients") == 2


# --- runs that stop and go on


def quiet() -> Console:
    return Console(file=io.StringIO())


def traces(folder: Path) -> dict[str, Any]:
    """Everything in which a run must equal one that was never stopped."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [line for line in lines if not line["name"].startswith("seconds")],
        "updates": [path.read_bytes() for path in sorted((folder / "updates").glob("*"))],
        "model": (folder / "model" / "model.safetensors").read_bytes(),
        "names": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if "clients" not in p.parts),
    }


@pytest.fixture
def stopping(toy_table: dict[str, Any]) -> dict[str, Any]:
    return {
        **toy_table,
        "partition": {"kind": "iid", "clients": 6},
        "participation": {"clients": 2},
        "uploads": {"min_clients": 2},
        "training": {"rounds": 4, "steps": 2, "batch_size": 8, "lr": 0.02},
    }


VISIT = Learner.visit


def diverging_when(condition: Callable[[str, Message], bool]) -> Callable[..., Any]:
    def diverging(self: Learner, client: str, data: Any, message: Message, *rest: Any) -> Any:
        found = VISIT(self, client, data, message, *rest)
        if condition(client, message):
            raise DivergedError("for the test")
        return found

    return diverging


def test_a_run_without_clients_left_stops_and_can_be_resumed_unchanged(
    stopping: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(stopping, out=tmp_path / "whole", console=quiet())
    folder, said = tmp_path / "stopped", io.StringIO()
    with monkeypatch.context() as patch:
        # In round 2, one of the two clients of every attempt diverges.
        attempts: set[int] = set()

        def first_of_its_attempt(client: str, message: Message) -> bool:
            first = message.round == 2 and message.attempt not in attempts
            attempts.update({message.attempt} if message.round == 2 else ())
            return first

        patch.setattr(Learner, "visit", diverging_when(first_of_its_attempt))
        with pytest.raises(FederationStoppedError) as caught:
            run(stopping, out=folder, console=Console(file=said, width=500))
        assert attempts == {0, 1, 2}
    for hint in (
        "round 3: after 3 attempts no other clients are left",
        "uploads.min_clients = 2",
        "a smaller training.lr than 0.02",
        "a larger method.gamma than 64.0",
        "training.max_grad_norm = 1.0",
    ):
        assert hint in str(caught.value)
    assert f"fedsmoothlora run --resume {folder}" in said.getvalue()
    assert not (folder / "model").exists()
    run(resume=folder, console=quiet())
    assert traces(folder) == traces(tmp_path / "whole")


def test_a_run_interrupted_in_a_repeated_round_is_resumed_unchanged(
    stopping: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_first_attempts(client: str, message: Message) -> bool:
        return (message.round, message.attempt) == (2, 0)

    monkeypatch.setattr(Learner, "visit", diverging_when(in_first_attempts))
    run(stopping, out=tmp_path / "whole", console=quiet())

    def interrupting(client: str, message: Message) -> bool:
        if (message.round, message.attempt) == (2, 1):
            os.kill(os.getpid(), signal.SIGINT)
        return in_first_attempts(client, message)

    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "visit", diverging_when(interrupting))
        with pytest.raises(InterruptedRunError):
            run(stopping, out=folder, console=quiet())
    run(resume=folder, console=quiet())
    assert traces(folder) == traces(tmp_path / "whole")
