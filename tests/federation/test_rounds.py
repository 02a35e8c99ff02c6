import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from families import PREDICTABLE, by_family
from fedsmoothlora import methods
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import FederationStoppedError
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from layer_names import QKV

Make = Callable[..., Simulation]
METHODS = methods.names()
GLOBAL = [name for name in METHODS if methods.find(name).traits.global_model]


class Notes(Callback):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


class NotNumbers:
    """A client's rows, with pixels that are not numbers."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        batch = self.examples.batch(rows)
        return {**batch, "pixel_values": batch["pixel_values"] * math.nan}


class Recorded:
    """A client's rows, and the batches that were asked for."""

    def __init__(self, examples: Any, on_first: Callable[[], None]) -> None:
        self.examples = examples
        self.on_first = on_first
        self.batches: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        if not self.batches:
            self.on_first()
        self.batches.append(self.examples.batch(rows))
        return self.batches[-1]


def finish(federation: Simulation, callback: Callback | None = None) -> list[RoundRecord]:
    return list(run_rounds(federation, callback or Callback()))


def global_weights(federation: Simulation) -> dict[str, Tensor]:
    """The global model's weights or, without a global model, the clients' own state."""
    backbone, server = federation.learner.model.backbone, federation.server
    weights = {name: backbone.weight(name, server.model.get(name)) for name in server.layers}
    own: dict[str, Tensor] = {}
    if not federation.learner.method.traits.global_model:
        for client in federation.clients:
            for round, kept in federation.states.load(client, Callback()).uploads.items():
                for name, value in kept.items():
                    dense = value if isinstance(value, Tensor) else value.dense()
                    own[f"{client}/{round}/{name}"] = dense
    return {**weights, **server.head, **own}


def assert_same_bits(first: Simulation, second: Simulation) -> None:
    one, other = global_weights(first), global_weights(second)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def metrics(records: Sequence[RoundRecord]) -> dict[tuple[int, str | None, str], float]:
    """All metrics but times."""
    return {
        (record.round, metric.client, metric.name): metric.value
        for record in records
        for metric in record.metrics
        if not metric.name.startswith("seconds")
    }


def metrics_by_hand(model: nn.Module, federation: Simulation) -> dict[str, float]:
    batch = federation.test.batch(range(len(federation.test)))
    with torch.no_grad():
        logits = model(pixel_values=batch["pixel_values"]).logits
    return {
        "accuracy": float((logits.argmax(-1) == batch["labels"]).float().mean()),
        "loss": float(functional.cross_entropy(logits, batch["labels"])),
    }


def pretrained(federation: Simulation) -> nn.Module:
    """A copy of the model before any round; its LoRA is zero, since PEFT starts with B = 0."""
    return copy.deepcopy(federation.learner.model.model).eval()


@pytest.mark.parametrize("method", by_family(METHODS))
def test_round_zero_is_the_pretrained_model_before_any_training(toy_federation: Make, method: str) -> None:
    federation = toy_federation({"method.name": method})
    wanted = metrics_by_hand(pretrained(federation), federation)
    first = next(iter(run_rounds(federation, Callback())))
    assert first.round == 0
    assert first.value("accuracy") == pytest.approx(wanted["accuracy"])
    assert first.value("loss") == pytest.approx(wanted["loss"], rel=1e-5)
    assert first.value("train_loss") is None


@pytest.mark.parametrize("method", by_family(METHODS))
def test_the_order_of_visits_changes_no_weight_and_no_metric(toy_federation: Make, method: str) -> None:
    overrides = {"method.name": method, "partition.clients": 6, "training.rounds": 2}
    one, other = toy_federation(overrides), toy_federation(overrides)
    clients = list(other.clients)
    other.clients = {client: other.clients[client] for client in clients[3:] + clients[2::-1]}
    first, second = metrics(finish(one)), metrics(finish(other))
    for found in (first, second):
        for round in (1, 2):
            found.pop((round, None, "train_loss"), None)  # the next test's; fed_sb trains from round 2 on
    assert first == second
    assert_same_bits(one, other)


def test_the_order_of_visits_does_not_change_the_mean_training_loss(toy_federation: Make) -> None:
    class Told:
        """A learner whose clients report losses whose sum depends on its order: .1 + .2 + .3."""

        def __init__(self, learner: Any, losses: dict[str, float]) -> None:
            self.learner, self.losses = learner, losses

        def __getattr__(self, name: str) -> Any:
            return getattr(self.learner, name)

        def visit(self, client: str, *rest: Any) -> Any:
            visited = self.learner.visit(client, *rest)
            metrics = {**visited.reply.metrics, "train_loss": self.losses[client]}
            return replace(visited, reply=replace(visited.reply, metrics=metrics))

    means = []
    for step in (1, -1):
        federation = toy_federation({"partition": {"kind": "iid", "clients": 3}, "training.rounds": 1})
        losses = dict(zip(federation.clients, (0.1, 0.2, 0.3), strict=True))
        federation.learner = Told(federation.learner, losses)  # type: ignore[assignment]
        federation.clients = dict(list(federation.clients.items())[::step])
        means.append(finish(federation)[-1].value("train_loss"))
    assert means[0] == means[1]


@pytest.mark.parametrize("method", by_family(METHODS))
def test_the_same_run_again_gives_the_same_bits(toy_federation: Make, method: str) -> None:
    one, other = toy_federation({"method.name": method}), toy_federation({"method.name": method})
    torch.manual_seed(1)
    first = metrics(finish(one))
    torch.manual_seed(2)
    assert metrics(finish(other)) == first
    assert_same_bits(one, other)


def test_another_seed_gives_another_run(toy_federation: Make) -> None:
    one, other = toy_federation(), toy_federation({"seed": 1})
    assert metrics(finish(one)) != metrics(finish(other))


@pytest.mark.parametrize("head_lr", [None, 0.2])
def test_a_single_client_of_fedit_continues_its_training(toy_federation: Make, head_lr: float | None) -> None:
    rounds, lr, lr_min = 3, 0.05, 0.01
    federation = toy_federation(
        {
            "method.name": "fedit",
            "partition": {"kind": "iid", "clients": 1},
            "lora.dropout": 0.0,
            "training.lr": lr,
            "training.lr_min": lr_min,
            "training.max_grad_norm": None,
            **({} if head_lr is None else {"model.head": "full", "training.head_lr": head_lr}),
        }
    )
    alone = pretrained(federation)
    adapted = federation.learner.model
    started: dict[str, Tensor] = {}

    def remember() -> None:
        for name, product in adapted.lora().items():
            started[f"{name}.lora_B.default.weight"] = product.B
            started[f"{name}.lora_A.default.weight"] = product.A

    (client, rows), *_ = federation.clients.items()
    recorded = Recorded(rows, remember)
    federation.clients = {client: recorded}
    finish(federation)

    alone.load_state_dict(started, strict=False)
    trained = {name: one for name, one in alone.named_parameters() if one.requires_grad}
    head = [trained.pop(name) for name in federation.server.head]
    steps = len(recorded.batches) // rounds
    assert steps == math.ceil(len(rows) / 8)
    for t in range(rounds):
        rate = lr_min + (lr - lr_min) / 2 * (1 + math.cos(math.pi * t / rounds))
        of_head = {"params": head, "lr": rate if head_lr is None else rate * head_lr / lr}
        optimizer = torch.optim.SGD([{"params": trained.values()}, of_head], lr=rate, momentum=0.9)
        for batch in recorded.batches[t * steps : (t + 1) * steps]:
            optimizer.zero_grad()
            functional.cross_entropy(alone(batch["pixel_values"]).logits, batch["labels"]).backward()
            optimizer.step()
    mine = dict(alone.named_parameters())
    for name, product in federation.server.model.items():
        assert float(product.B.norm()) > 0
        assert torch.equal(product.B, mine[f"{name}.lora_B.default.weight"])
        assert torch.equal(product.A, mine[f"{name}.lora_A.default.weight"])
    for name, value in federation.server.head.items():
        assert torch.equal(value, mine[name])


def test_the_global_weight_is_pretrained_plus_the_scaled_sum_of_server_updates(toy_federation: Make) -> None:
    federation = toy_federation({"training.rounds": 4})
    server, backbone = federation.server, federation.learner.model.backbone
    start = {name: backbone.weight(name).double() for name in server.layers}
    total = {name: torch.zeros_like(weight) for name, weight in start.items()}
    for record in run_rounds(federation, Callback()):
        assert len(server.updates) == record.round
        for name in server.layers:
            if record.round:
                update = server.updates[-1][name]
                assert update.rank <= 2
                total[name] += update.B.double() @ update.A.double()
            wanted = start[name] + 4 / 2 * total[name]  # s = alpha / r
            module = federation.learner.model.modules[name]
            torch.testing.assert_close(backbone.weight(name).double(), wanted, rtol=1e-5, atol=1e-5)
            assert torch.equal(module.weight, backbone.weight(name))  # the model that was evaluated
    assert all(float(sums.norm()) > 0 for sums in total.values())


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("method", by_family(METHODS))
def test_a_client_that_diverges_is_noted_and_left_out(toy_federation: Make, method: str) -> None:
    with_it, without = toy_federation({"method.name": method}), toy_federation({"method.name": method})
    lost = list(with_it.clients)[1]
    with_it.clients = {
        client: NotNumbers(rows) if client == lost else rows for client, rows in with_it.clients.items()
    }
    without.clients = {client: rows for client, rows in without.clients.items() if client != lost}
    callback = Notes()
    records = finish(with_it, callback)
    finish(without)
    assert_same_bits(with_it, without)
    assert sum(lost in note and "diverged" in note for note in callback.notes) == 3  # once a round
    assert [record.value("clients") for record in records[1:]] == [2, 2, 2]


def test_a_client_whose_update_overflows_is_left_out_too(toy_federation: Make) -> None:
    """Finite factors whose product is not finite: the third way to diverge."""
    federation = toy_federation({"method.name": "fedsmoothlora", "training.rounds": 1})
    lost = list(federation.clients)[1]
    adapted = federation.learner.model
    honest = adapted.lora
    current: list[str] = []

    class Visits(Notes):
        def on_client_begin(self, client: str, steps: int) -> None:
            current[:] = [client]

    def overflowing() -> Any:
        scale = 1e30 if current == [lost] else 1.0
        return {name: type(p)(p.B * scale, p.A * scale) for name, p in honest().items()}

    adapted.lora = overflowing  # type: ignore[method-assign]
    callback = Visits()
    records = finish(federation, callback)
    assert any(lost in note for note in callback.notes)
    assert records[-1].value("clients") == 2


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("method", by_family(METHODS))
def test_when_all_diverge_the_run_stops_and_says_what_to_try(toy_federation: Make, method: str) -> None:
    federation = toy_federation({"method.name": method})
    federation.clients = {client: NotNumbers(rows) for client, rows in federation.clients.items()}
    before = global_weights(federation)
    with pytest.raises(FederationStoppedError, match=r"round 1.*training\.lr"):
        finish(federation)
    assert all(torch.equal(value, before[name]) for name, value in global_weights(federation).items())


# One of each family learns in test_federation.py.
@pytest.mark.parametrize("method", by_family(METHODS, fast=["fedsmoothlora"]))
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"lora.target_modules": []},
        {
            "model.head": "lora",
            "lora.target_modules": [*QKV, "classifier"],
            "lora.head_r": 1,
        },
    ],
    ids=["full head", "head only", "head by lora"],
)
def test_the_federation_learns(toy_federation: Make, method: str, overrides: dict[str, Any]) -> None:
    if method == "ravan" and "lora.head_r" in overrides:
        # A multiple of two heads; in few random directions, steps are larger.
        overrides = {**overrides, "lora.head_r": 2, "training.lr": 0.2}
    records = finish(
        toy_federation({"method.name": method, "training.rounds": 6, "training.lr": 0.05, **overrides})
    )
    first, last = records[0], records[-1]
    assert last.value("accuracy") >= max(first.value("accuracy") or 0, 0.25) + 0.2
    assert (last.value("loss") or math.inf) < (first.value("loss") or 0)


def numbers(m: int, n: int, ranks: int = 1) -> int:
    """How many numbers a product of that rank has, or the dense matrix if it has fewer."""
    return min(ranks * (m + n), m * n)


# Numbers a layer and client, (m, n) its shape and t the round: up, and down from the second round on.
R, CLIENTS = 2, 3
COSTS: dict[str, tuple[Callable[[int, int, int], int], Callable[[int, int, int], int]]] = {
    "fedsmoothlora": (lambda m, n, t: R * (m + n), lambda m, n, t: R * (m + n)),
    "fedit": (lambda m, n, t: R * (m + n), lambda m, n, t: R * (m + n)),
    "ffa": (lambda m, n, t: R * m, lambda m, n, t: R * m),
    # Down comes what the round before averaged.
    "rolora": (lambda m, n, t: R * (n if t % 2 else m), lambda m, n, t: R * (m if t % 2 else n)),
    "fedsa": (lambda m, n, t: R * n, lambda m, n, t: R * n),
    "flora": (lambda m, n, t: R * (m + n), lambda m, n, t: numbers(m, n, CLIENTS * R)),
    # The factors, and the residual of the mean: of the clients' products and the product of means.
    "fedex": (
        lambda m, n, t: R * (m + n),
        lambda m, n, t: R * (m + n) + numbers(m, n, (CLIENTS + 1) * R),
    ),
    "flexlora": (lambda m, n, t: R * (m + n), lambda m, n, t: R * (m + n)),
    # The leading part and the rest are the mean together.
    "fedmomentum": (lambda m, n, t: R * (m + n), lambda m, n, t: numbers(m, n, CLIENTS * R)),
    "frlora": (lambda m, n, t: R * (m + n), lambda m, n, t: R * (m + n)),
    "fed_svd": (lambda m, n, t: R * m, lambda m, n, t: R * (m + n)),
    "lora_fair": (lambda m, n, t: R * (m + n), lambda m, n, t: R * (m + n)),
    "florist": (lambda m, n, t: R * (m + n), lambda m, n, t: numbers(m, n, CLIENTS * R)),
    "hetlora": (lambda m, n, t: R * (m + n), lambda m, n, t: R * (m + n)),
    "ravan": (lambda m, n, t: R, lambda m, n, t: R),  # two heads of rank 1
    # The factors of the gradient are exchanged once.
    "fed_sb": (
        lambda m, n, t: R * R if t else R * (m + n),
        lambda m, n, t: R * R if t > 1 else R * (m + n),
    ),
    "full": (lambda m, n, t: m * n, lambda m, n, t: m * n),
    "local": (lambda m, n, t: 0, lambda m, n, t: 0),
}
TWICE = pytest.mark.xfail(
    strict=True,
    reason="the update B A - B_0 A_0 is sent as it is, of rank 2r, though B_0 A_0 is known to all",
)


def test_the_costs_list_every_method() -> None:
    assert COSTS.keys() == set(METHODS)


@pytest.mark.parametrize("method", [pytest.param(m, marks=[TWICE] * (m == "frlora")) for m in COSTS])
def test_every_round_records_bytes_and_clients(toy_federation: Make, method: str) -> None:
    federation = toy_federation({"method.name": method, **PREDICTABLE.get(method, {})})
    layers = federation.server.layers.values()
    head = sum(value.nbytes for value in federation.server.head.values())
    # Local training shares no head; only newcomers are sent the one that all start from.
    head_later = 0 if method == "local" else head
    records = finish(federation)
    assert [record.round for record in records] == [0, 1, 2, 3]
    up, down = COSTS[method]
    for record in records[1:]:
        t = record.round - 1
        assert record.value("bytes_up") == 3 * (4 * sum(up(x.m, x.n, t) for x in layers) + head_later)
        wanted = 4 * sum(down(x.m, x.n, t) for x in layers) + head_later if t else head
        assert record.value("bytes_down") == 3 * wanted
        samples = {f.client: f.value for f in record.metrics if f.name == "samples"}
        assert samples == {client: len(rows) for client, rows in federation.clients.items()}


@pytest.mark.parametrize("method", by_family(METHODS))
def test_metrics_that_are_means_of_clients_are_marked(toy_federation: Make, method: str) -> None:
    federation = toy_federation({"method.name": method, "training.rounds": 2})
    before, *records = finish(federation)
    assert before.value("mean_of_clients") is None  # nobody has trained: they are all the pretrained model
    for record in records:
        if method in GLOBAL:
            assert record.value("mean_of_clients") is None
            continue
        assert record.value("mean_of_clients") == 3
        for name in ("accuracy", "loss"):
            own = [f.value for f in record.metrics if f.name == f"on_test_{name}" and f.client is not None]
            assert len(own) == 3
            assert record.value(name) == pytest.approx(sum(own) / 3)
