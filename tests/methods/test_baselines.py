"""The field's methods against their formulas, in dense float64 by numpy, and against training by hand."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from oracles import (
    COUNTS,
    LAYERS,
    RANK,
    SCALE,
    aggregate,
    client_view,
    close,
    dense,
    initial,
    mean,
    mean_of_products,
    method,
    normal,
    of_rank,
    pretrained,
    products,
    server_view,
    svd,
    three,
)
from torch import Tensor, nn
from torch.nn import functional

from fedsmoothlora import methods
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import LostStateError
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.server import Server
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.methods import Layer, ServerUpdate, Start

# -- the server's formulas ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["flora", "fedex", "fedmomentum"])
def test_the_merged_update_plus_the_model_is_exactly_the_mean_product(name: str, seed: int) -> None:
    uploads = three(seed)
    update = aggregate(name, uploads)
    for layer in LAYERS:
        whole = dense(update.merge[layer]) + dense(update.model.get(layer))
        close(whole, mean_of_products(uploads, layer))


def test_flora_keeps_no_model_and_starts_afresh() -> None:
    assert not aggregate("flora", three(0)).model
    starts = [method("flora").start(client_view(round, kept=products(3))) for round in (0, 4)]
    for name, layer in LAYERS.items():
        one, other = (start.lora[name] for start in starts)
        assert not one.B.any()
        assert not other.B.any()
        assert not torch.equal(one.A, other.A)  # new rows in every round
        assert bool((one.A.norm(dim=1) > 0).all())
        assert float(one.A.abs().max()) <= 1 / math.sqrt(layer.n)


def test_fedex_continues_from_the_means_of_factors() -> None:
    uploads = three(1)
    update = aggregate("fedex", uploads)
    start = method("fedex").start(client_view(1, server_lora=update.model))
    for name in LAYERS:
        close(start.lora[name].B.numpy(), mean([u[name].B.numpy() for u in uploads]))
        close(start.lora[name].A.numpy(), mean([u[name].A.numpy() for u in uploads]))


@pytest.mark.parametrize("seed", range(3))
def test_ffa_averages_exactly_because_clients_share_one_factor(seed: int) -> None:
    ffa = method("ffa")
    start = ffa.start(client_view())
    assert tuple(start.trains) == ("B",)
    trained = [{n: LowRank(u[n].B, start.lora[n].A) for n in LAYERS} for u in three(seed)]
    sent = [ffa.upload(one, start, client_view()).sent for one in trained]
    update = aggregate("ffa", sent)
    again = ffa.start(client_view(1, server_lora=update.lora))
    newcomer = ffa.start(client_view(1, server_lora=update.model))
    for name in LAYERS:
        assert torch.equal(start.lora[name].A, initial(name).A)
        assert not start.lora[name].B.any()
        assert torch.equal(sent[0][name], trained[0][name].B)
        want = mean_of_products(trained, name)
        for product in (update.model[name], again.lora[name], newcomer.lora[name]):
            close(dense(product), want)
            assert torch.equal(product.A, initial(name).A)
    assert not update.merge


def test_rolora_averages_one_factor_after_the_other_exactly() -> None:
    rolora = method("rolora")
    views = [client_view(0) for _ in range(3)]
    model: Mapping[str, LowRank] = {}
    for round in range(4):
        starts = [rolora.start(view) for view in views]
        part = "B" if round % 2 == 0 else "A"
        assert {tuple(start.trains) for start in starts} == {(part,)}
        trained, uploads = [], []
        for c, (start, view) in enumerate(zip(starts, views, strict=True)):
            moved = products(50 * round + c)
            trained.append({n: replace_factor(start.lora[n], part, moved[n]) for n in LAYERS})
            uploads.append(rolora.upload(trained[-1], start, view))
        update = aggregate("rolora", [upload.sent for upload in uploads], round, model=model)
        for name in LAYERS:
            close(dense(update.model[name]), mean_of_products(trained, name))
            shared = {"A", "B"} - {part}
            for factor in shared:  # the one that was not trained stays, at all clients and at the server
                before = getattr(model[name] if model else initial(name), factor)
                assert all(torch.equal(getattr(start.lora[name], factor), before) for start in starts)
                assert torch.equal(getattr(update.model[name], factor), before)
        model = update.model
        views = [client_view(round + 1, server_lora=update.lora, kept=upload.kept) for upload in uploads]


def replace_factor(product: LowRank, part: str, other: LowRank) -> LowRank:
    return LowRank(other.B, product.A) if part == "B" else LowRank(product.B, other.A)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["flexlora", "fedmomentum"])
def test_the_next_lora_is_the_svd_of_the_mean_product(name: str, seed: int) -> None:
    uploads = three(seed)
    update = aggregate(name, uploads)
    start = method(name).start(client_view(1, server_lora=update.model))
    for layer in LAYERS:
        want = svd(mean_of_products(uploads, layer), RANK)
        close(dense(update.model[layer]), want)
        close(dense(start.lora[layer]), want)
        assert update.model[layer].rank == RANK
    assert not start.shift
    if name == "flexlora":
        assert not update.merge
        assert not update.memory


def test_flexlora_with_feedback_loses_nothing() -> None:
    """The sent product plus the new memory equals the mean plus the old memory."""
    flexlora, memory = method("flexlora", server_feedback=True), {}
    before = {name: np.zeros((layer.m, layer.n)) for name, layer in LAYERS.items()}
    for round in range(5):
        uploads = three(10 * round)
        update = flexlora.aggregate(uploads, COUNTS, server_view(round, memory=memory))
        for name in LAYERS:
            total = mean_of_products(uploads, name) + before[name]
            close(dense(update.model[name]), svd(total, RANK))
            np.testing.assert_allclose(
                dense(update.model[name]) + dense(update.memory[name]), total, atol=1e-4 * np.abs(total).max()
            )
            before[name] = dense(update.memory[name])
        memory = dict(update.memory)


def test_flexlora_refuses_feedback_rank_without_feedback() -> None:
    with pytest.raises(ValueError, match=r"method\.feedback_rank = 3"):
        method("flexlora", feedback_rank=3).check(LAYERS, partial=False)
    method("flexlora", feedback_rank=3, server_feedback=True).check(LAYERS, partial=True)


def test_frlora_restarts_every_round_from_the_leading_part_of_the_pretrained_weights() -> None:
    frlora, weights = method("frlora"), {name: pretrained(name).numpy() for name in LAYERS}
    first: Start | None = None
    for round in range(3):
        view = client_view(round, server_lora=products(9), kept=products(8))
        start = frlora.start(view)
        first = first or start
        uploads = three(30 * round)
        update = frlora.aggregate(uploads, COUNTS, server_view(round))
        assert not update.model
        assert frlora.upload(uploads[0], start, view).sent is uploads[0]
        for name in LAYERS:
            lora = start.lora[name]
            assert torch.equal(lora.B, first.lora[name].B)
            assert torch.equal(lora.A, first.lora[name].A)
            close(dense(lora), svd(pretrained(name).numpy(), RANK) / SCALE)
            sigma = np.linalg.svd(pretrained(name).numpy(), compute_uv=False)[:RANK]
            close((lora.B.mT @ lora.B).numpy(), np.diag(sigma / SCALE))  # sqrt(sigma / s) on both
            close((lora.A @ lora.A.mT).numpy(), np.diag(sigma / SCALE))
            # Training begins at exactly W^t: the backbone gives what the LoRA holds.
            effective = weights[name] + SCALE * (dense(start.shift[name]) + dense(lora))
            close(effective, weights[name])
            averaged = mean([u[name].B.numpy() for u in uploads]) @ mean([u[name].A.numpy() for u in uploads])
            close(dense(update.merge[name]), averaged - dense(lora))
            weights[name] = weights[name] + SCALE * dense(update.merge[name])


def test_frlora_without_training_changes_nothing() -> None:
    start = method("frlora").start(client_view())
    update = aggregate("frlora", [start.lora] * 3)
    for name in LAYERS:
        close(dense(update.merge[name]), np.zeros((LAYERS[name].m, LAYERS[name].n)))


def test_full_merges_the_mean_of_changes() -> None:
    full = method("full")
    start = full.start(client_view())
    assert tuple(start.trains) == ("W",)
    assert not start.lora
    uploads = [
        {name: normal(x.m, x.n, seed=c + 10 * i) for i, (name, x) in enumerate(LAYERS.items())}
        for c in range(3)
    ]
    assert full.upload(uploads[0], start, client_view()).sent == uploads[0]
    update = aggregate("full", uploads)
    assert not update.model
    for name in LAYERS:
        close(dense(update.merge[name]), mean_of_products(uploads, name))


def test_local_sends_nothing_and_continues_from_its_own_lora() -> None:
    local = method("local")
    newcomer = local.start(client_view())
    trained = products(4)
    upload = local.upload(trained, newcomer, client_view())
    assert not upload.sent
    later = local.start(client_view(1, kept={**upload.kept, "classifier.weight": torch.zeros(3)}))
    assert set(later.lora) == set(LAYERS)
    for name in LAYERS:
        assert torch.equal(newcomer.lora[name].A, initial(name).A)
        assert torch.equal(later.lora[name].B, trained[name].B)
        assert torch.equal(later.lora[name].A, trained[name].A)
    assert aggregate("local", [{}, {}, {}]) == ServerUpdate()


def test_fedsa_shares_one_factor_and_keeps_the_other() -> None:
    fedsa, trained = method("fedsa"), three(6)
    start = fedsa.start(client_view())
    assert set(start.trains) == {"B", "A"}
    uploads = [fedsa.upload(one, start, client_view()) for one in trained]
    update = aggregate("fedsa", [upload.sent for upload in uploads])
    assert not update.merge
    assert not update.model
    assert update.lora is not None
    for c, upload in enumerate(uploads):
        later = fedsa.start(client_view(1, server_lora=update.lora, kept=upload.kept))
        for name in LAYERS:
            assert torch.equal(upload.sent[name], trained[c][name].A)
            assert torch.equal(later.lora[name].B, trained[c][name].B)
            close(later.lora[name].A.numpy(), mean([one[name].A.numpy() for one in trained]))
    newcomer = fedsa.start(client_view(1, server_lora=update.lora))
    assert not any(newcomer.lora[name].B.any() for name in LAYERS)


@pytest.mark.parametrize(
    "name", ["fedit", "fedex", "ffa", "rolora", "fedsa", "local", "fedmomentum", "flexlora"]
)
def test_the_first_round_starts_from_the_common_initialisation(name: str) -> None:
    start = method(name).start(client_view())
    assert not start.shift
    for layer in LAYERS:
        assert torch.equal(start.lora[layer].B, initial(layer).B)
        assert torch.equal(start.lora[layer].A, initial(layer).A)


# -- clients of different rank -----------------------------------------------------------------------


def ranked(ranks: Sequence[int]) -> list[dict[str, LowRank]]:
    return [products(100 * c, rank) for c, rank in enumerate(ranks)]


def test_the_methods_whose_clients_may_have_ranks_of_their_own_are_known() -> None:
    own = {name for name in methods.names() if method(name).traits.client_ranks}
    assert own == {"fedsmoothlora", "flexlora", "flora", "florist", "hetlora", "local"}
    # Averaging factors apart needs factors of one shape.
    assert not any(method(name).traits.averages_factors for name in own)


@pytest.mark.parametrize("ranks", [(1, 2, 3), (4, 1, 1)])
def test_flora_merges_uploads_of_any_rank_exactly(ranks: Sequence[int]) -> None:
    uploads = ranked(ranks)
    update = aggregate("flora", uploads)
    for name in LAYERS:
        close(dense(update.merge[name]), mean_of_products(uploads, name))
        m, n = update.merge[name].shape
        # Once the matrix has fewer numbers than all the factors, it stands for them.
        stacked = sum(ranks) * (m + n) <= m * n
        assert update.merge[name].rank == (sum(ranks) if stacked else min(m, n))
    for rank in ranks:
        start = method("flora").start(client_view(1, layers=of_rank(rank)))
        assert all(start.lora[name].rank == rank for name in LAYERS)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_flexlora_gives_every_client_the_svd_at_its_own_rank(rank: int) -> None:
    uploads = ranked((1, 2, 3))
    update = aggregate("flexlora", uploads, layers=of_rank(3))
    start = method("flexlora").start(client_view(1, layers=of_rank(rank), server_lora=update.model))
    for name in LAYERS:
        assert start.lora[name].rank == rank
        close(dense(start.lora[name]), svd(mean_of_products(uploads, name), rank))


def test_flexlora_gives_a_client_of_higher_rank_directions_that_can_move() -> None:
    uploads = ranked((1, 1, 1))
    update = aggregate("flexlora", uploads, layers=of_rank(1))
    start = method("flexlora").start(client_view(1, layers=of_rank(3), server_lora=update.model))
    for name in LAYERS:
        close(dense(start.lora[name]), svd(mean_of_products(uploads, name), 1))
        assert bool((start.lora[name].A.norm(dim=1) > 0).all())


def test_local_continues_at_its_own_rank() -> None:
    kept = products(3, rank=1)
    start = method("local").start(client_view(1, layers=of_rank(1), kept=kept))
    assert all(start.lora[name].rank == 1 for name in LAYERS)


# -- missed rounds and lost states -------------------------------------------------------------------


def server_of(name: str) -> Server:
    own = method(name)
    origin = InitialState(LAYERS, 0, pretrained, prepared=own.prepare(LAYERS, pretrained))
    return Server(method=own, layers=LAYERS, initial_state=origin, rounds=9, head={})


def part_of(value: LowRank | Tensor, sent: str) -> Any:
    assert isinstance(value, LowRank)
    return value.B if sent == "B" else value.A


def play(there: Server, clients: Sequence[str], seed: int) -> dict[str, Message]:
    """A round in which these clients take part, each with factors of its own."""
    messages = {client: there.message(client) for client in clients}
    sent = there.method.sends(there.round)
    replies = []
    for c, client in enumerate(clients):
        there.delivered(client)
        moved = {name: part_of(value, sent).float() for name, value in products(seed + 100 * c).items()}
        replies.append(Reply(client=client, round=there.round, samples=c + 1, sent=moved))
    there.aggregate(replies)
    return messages


@pytest.mark.parametrize("missed", [1, 2, 3])
def test_a_client_of_rolora_that_missed_a_round_receives_both_factors(missed: int) -> None:
    there = server_of("rolora")
    play(there, ["always", "away"], 0)
    for round in range(missed):
        play(there, ["always"], 1 + round)
    back, always, newcomer = (there.message(client).lora for client in ("away", "always", "newcomer"))
    for name in LAYERS:
        assert isinstance(always[name], Tensor)
        for lora in (back, newcomer):
            value = lora[name]
            assert isinstance(value, LowRank)
            assert torch.equal(value.B, there.model[name].B)
            assert torch.equal(value.A, there.model[name].A)
    # Whatever it kept from its own last round is not used.
    stale = dict.fromkeys(LAYERS, "stale")
    start = there.method.start(client_view(there.round, server_lora=back, kept=stale))
    assert all(start.lora[name] is back[name] for name in LAYERS)


def test_a_client_of_rolora_without_the_other_factor_cannot_start() -> None:
    there = server_of("rolora")
    play(there, ["a"], 0)
    with pytest.raises(LostStateError, match="layer tall"):
        there.method.start(client_view(1, server_lora=there.message("a").lora))


def test_every_client_of_fedsa_receives_the_shared_factor() -> None:
    there = server_of("fedsa")
    play(there, ["always", "away"], 0)
    play(there, ["always"], 1)
    assert there.lora
    for client in ("always", "away", "newcomer"):
        got = there.message(client).lora
        assert all(torch.equal(got[name], there.lora[name]) for name in LAYERS)


class Notes(Callback):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def test_a_client_of_rolora_that_lost_its_state_sits_out_a_round_and_comes_back(
    toy_federation: Callable[..., Simulation],
) -> None:
    federation = toy_federation({"method.name": "rolora", "training.rounds": 4})
    lost, callback = next(iter(federation.clients)), Notes()
    counts = []
    for record in run_rounds(federation, callback):
        counts.append(record.value("clients"))
        if record.round == 2:
            federation.states.save(lost, ClientState())
    assert counts[1:] == [3, 3, 2, 3]
    assert sum(f"client {lost} sits out round 3" in note for note in callback.notes) == 1


def test_a_client_of_local_that_lost_its_state_restarts_without_another_clients_head(
    toy_federation: Callable[..., Simulation],
) -> None:
    federation = toy_federation({"method.name": "local"})
    rounds = run_rounds(federation, Callback())
    next(rounds), next(rounds)
    client, rows = next(iter(federation.clients.items()))
    loaded: list[dict[str, Tensor]] = []
    model = federation.learner.model
    real = model.load_head
    model.load_head = lambda head: (loaded.append(dict(head)), real(head))[1]  # type: ignore[method-assign]
    message = federation.server.message(client)
    assert not message.head
    federation.learner.visit(client, rows, message, ClientState(), Callback())
    assert all(torch.equal(value, federation.server.head[name]) for name, value in loaded[0].items())
    assert loaded[0].keys() == federation.server.head.keys()


# -- one client alone --------------------------------------------------------------------------------


class Recorded:
    """A client's rows, the requested batches, and the LoRA at the start of every round."""

    def __init__(self, examples: Any, lora: Callable[[], Any], steps: int) -> None:
        self.examples, self.lora, self.steps = examples, lora, steps
        self.batches: list[dict[str, Tensor]] = []
        self.starts: list[Any] = []

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        if len(self.batches) % self.steps == 0:
            self.starts.append(self.lora())
        self.batches.append(self.examples.batch(rows))
        return self.batches[-1]


class ByHand:
    """A PEFT model, trained by a hand-written loop, and its three tensors by layer."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        self.model, self.layers = model, layers

    def tensors(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        layer = self.model.get_submodule(name)
        return layer.base_layer.weight, layer.lora_B["default"].weight, layer.lora_A["default"].weight

    def effective(self, name: str) -> Tensor:
        W, B, A = self.tensors(name)
        return (W + self.layers[name].scale * B @ A).detach()

    @torch.no_grad()
    def begin(self, lora: Mapping[str, LowRank]) -> None:
        for name, product in lora.items():
            for tensor, value in zip(self.tensors(name)[1:], (product.B, product.A), strict=True):
                tensor.copy_(value)

    @torch.no_grad()
    def merge(self, name: str, sign: float = 1.0) -> None:
        W, B, A = self.tensors(name)
        W += sign * self.layers[name].scale * B @ A

    @torch.no_grad()
    def refactor(self, name: str, *, orthonormal: bool = False) -> None:
        """The same product, as singular factors: balanced, or with orthonormal rows of ``A``."""
        _, B, A = self.tensors(name)
        U, sigma, Vt = np.linalg.svd((B.double() @ A.double()).numpy(), full_matrices=False)
        root, r = np.sqrt(sigma), B.shape[1]
        left, right = (U * sigma, Vt) if orthonormal else (U * root, root[:, None] * Vt)
        B.copy_(torch.from_numpy(left[:, :r]))
        A.copy_(torch.from_numpy(right[:r]))

    def train(self, batches: Sequence[Mapping[str, Tensor]], rate: float, parts: str) -> None:
        for name in self.layers:
            for part, tensor in zip("WBA", self.tensors(name), strict=True):
                tensor.requires_grad_(part in parts)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9)
        for batch in batches:
            optimizer.zero_grad()
            functional.cross_entropy(self.model(batch["pixel_values"]).logits, batch["labels"]).backward()
            optimizer.step()


# What one client trains in round t.
PARTS = {"ffa": ("B", "B"), "fed_svd": ("B", "B"), "rolora": ("B", "A"), "full": ("W", "W")}


# Their own tests say what one client of these does: they start from gradients, or train what PEFT has not.
ELSEWHERE = ("fedsmoothlora", "fed_sb", "ravan")


@pytest.mark.parametrize("name", [name for name in methods.names() if name not in ELSEWHERE])
def test_a_lone_client_trains_as_the_formulas_say(
    toy_federation: Callable[..., Simulation], name: str
) -> None:
    rounds, lr = 3, 0.05
    federation = toy_federation(
        {
            "method.name": name,
            **({"method.energy": 1.0} if name == "florist" else {}),  # all of the client's product
            "partition": {"kind": "iid", "clients": 1},
            "lora.dropout": 0.0,
            "training.lr": lr,
            "training.rounds": rounds,
            "training.max_grad_norm": None,
        }
    )
    layers = federation.server.layers
    alone = ByHand(copy.deepcopy(federation.learner.model.model).eval(), layers)
    before = {layer: alone.effective(layer).clone() for layer in layers}
    (client, rows), *_ = federation.clients.items()
    recorded = Recorded(rows, federation.learner.model.lora, math.ceil(len(rows) / 8))
    federation.clients = {client: recorded}
    for _ in run_rounds(federation, Callback()):
        pass

    fresh = name in ("flora", "florist", "frlora")
    for t in range(rounds):
        if t == 0 or fresh:
            alone.begin(recorded.starts[t] if name != "full" else {})
        for layer in layers:
            if name == "frlora":
                alone.merge(layer, -1.0)  # W -= s B_0 A_0
            if name in ("flexlora", "fedmomentum", "fed_svd") and t:
                alone.refactor(layer, orthonormal=name == "fed_svd")
        rate = lr / 2 * (1 + math.cos(math.pi * t / rounds))
        batches = recorded.batches[t * recorded.steps : (t + 1) * recorded.steps]
        alone.train(batches, rate, PARTS.get(name, ("BA", "BA"))[t % 2])
        if fresh:
            for layer in layers:
                alone.merge(layer)
    if fresh:
        alone.begin(
            {n: LowRank(torch.zeros(x.m, x.rank), torch.zeros(x.rank, x.n)) for n, x in layers.items()}
        )

    server, backbone = federation.server, federation.learner.model.backbone
    kept = federation.states.load(client, Callback()).uploads[rounds - 1]
    for layer in layers:
        lora = server.model.get(layer)
        if name == "local":
            lora = kept[layer]
        elif name == "fedsa":
            lora = LowRank(kept[layer], (server.lora or {})[layer])
        want = alone.effective(layer)
        torch.testing.assert_close(backbone.weight(layer, lora), want, rtol=1e-4, atol=2e-5)
        assert float((want - before[layer]).norm()) > 1e-2
    head = kept if name == "local" else server.head
    mine = dict(alone.model.named_parameters())
    for part in server.head:
        torch.testing.assert_close(head[part], mine[part].detach(), rtol=1e-4, atol=2e-5)
