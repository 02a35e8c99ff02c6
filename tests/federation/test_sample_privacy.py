"""Sample-level privacy: what leaves a client, what it has spent, and neighbours that differ in one row."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsmoothlora import methods
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.data.examples import Batch, Examples
from fedsmoothlora.errors import ConfigError, SpentBudgetError, StateError
from fedsmoothlora.federation.accounting import _ORDERS, MemoryLedger
from fedsmoothlora.federation.assembly import RunContext
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.noise import secure_uniforms
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import ClientReply, Simulation
from fedsmoothlora.federation.wire import pack
from fedsmoothlora.storage.client_store import StoredStates

pytest.importorskip("opacus")

Make = Callable[..., Simulation]
ON: dict[str, Any] = {
    **{"privacy.unit": "sample", "privacy.clip_norm": 0.5, "privacy.noise_multiplier": 1.1},
    **{"privacy.delta": 1e-3, "privacy.sample_rate": 0.25, "privacy.seed": 3},
    **{"training.steps": 2, "training.rounds": 2, "lora.dropout": 0.0},
    **{
        "method.name": "fedit",
        "model.head": "full",
        "method.gamma": None,
        "method.calibration_batches": None,
    },
}
RANDOM_START = {"method.name": "fedsmoothlora", "method.gradient_aligned": "random", "method.gamma": 64.0}
PUBLIC = {"privacy.public_counts": True, "privacy.sample_rate": None}
PRIVATE = [
    name
    for name in methods.names()
    if name != "fedsmoothlora" and not methods.find(name)().no_sample_privacy_reason
]


def private(make: Make, changes: Mapping[str, Any] | None = None) -> Simulation:
    """A toy federation with sample-level privacy; None removes a key."""
    chosen = {**ON, **(changes or {})}
    return make({key: value for key, value in chosen.items() if value is not None})


class Recorder:
    """The engine of a federation, and every reply that it yields."""

    in_turn = True

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.replies: list[ClientReply] = []

    def train(self, *arguments: Any) -> Any:
        for one in self.engine.train(*arguments):
            self.replies.append(one)
            yield one

    def validate(self, simulation: Simulation, *_: Any) -> Mapping[str, Any]:
        assert not simulation.validation
        return {}


class Shown(Callback):
    def __init__(self) -> None:
        self.steps: list[float] = []
        self.notes: list[str] = []

    def on_client_begin(self, client: str, steps: int) -> None:
        self.steps.append(steps)

    def on_client_step(self, client: str, loss: float) -> None:
        self.steps.append(loss)

    def on_note(self, text: str) -> None:
        self.notes.append(text)


@dataclass(frozen=True)
class Without:
    """Rows without one of them."""

    rows: Examples
    left_out: int

    def __len__(self) -> int:
        return len(self.rows) - 1

    def batch(self, rows: Sequence[int]) -> Batch:
        return self.rows.batch([row + (row >= self.left_out) for row in rows])


def visited(learner: Learner, rows: Examples, ledger: Any = None, round: int = 0) -> Any:
    return learner.visit("0", rows, Message(round=round), ClientState(), Callback(), ledger)


def vector(values: Mapping[str, Any]) -> Tensor:
    parts = [
        part.flatten().double()
        for value in values.values()
        for part in ([value.B, value.A] if isinstance(value, LowRank) else [value])
    ]
    return torch.cat(parts)


def opacus_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for _ in range(steps):
        accountant.step(noise_multiplier=noise, sample_rate=rate)
    return float(accountant.get_epsilon(delta, alphas=_ORDERS))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="fedit"),
        pytest.param(RANDOM_START, id="fedsmoothlora"),
        pytest.param({"transport.bits": 4}, id="4-bits"),
    ],
)
def test_nothing_but_the_upload_and_epsilon_leaves_a_client(toy_federation: Make, changes: Any) -> None:
    federation = private(toy_federation, changes)
    engine = federation.engine = Recorder(federation.engine)  # type: ignore[assignment]
    shown = Shown()
    records = list(run_rounds(federation, shown))

    assert len(engine.replies) == 6
    for one in engine.replies:
        fields = {
            **{
                "client": one.client,
                "experiment": "",
                "round": one.reply.round,
                "attempt": 0,
                "exchange": 0,
                "samples": 1,
            },
            **{"metrics:epsilon": one.reply.metrics["epsilon"], "metrics:seeded_noise": 1.0},
        }
        assert pack(one.reply).fields == fields
        assert one.start == {}
    assert (shown.steps, shown.notes) == ([], [])
    for record in records[1:]:
        by_client = {metric.name for metric in record.metrics if metric.client is not None}
        assert by_client == {"epsilon", "seeded_noise", "bytes_up"}
        assert not {"train_loss", "samples"} & {metric.name for metric in record.metrics}


def test_epsilon_is_that_of_opacus_for_the_same_steps(toy_federation: Make) -> None:
    records = list(run_rounds(private(toy_federation), Callback()))
    for record, steps in zip(records[1:], (2, 4), strict=True):
        assert record.value("epsilon") == pytest.approx(opacus_epsilon(1.1, 0.25, steps, 1e-3), rel=1e-6)
        assert record.value("seeded_noise") == 1.0


def test_with_public_counts_each_client_has_its_own_rate_and_the_largest_epsilon_is_shown(
    toy_federation: Make,
) -> None:
    federation = private(toy_federation, {**PUBLIC, "training.steps": None, "training.epochs": 1})
    engine = federation.engine = Recorder(federation.engine)  # type: ignore[assignment]
    records = list(run_rounds(federation, Callback()))

    assert len({len(rows) for rows in federation.clients.values()}) > 1
    found = {}
    for one in engine.replies:
        rows = len(federation.clients[one.client])
        assert one.reply.samples == rows
        steps = math.ceil(rows / 8) * (one.reply.round + 1)
        expected = opacus_epsilon(1.1, min(1.0, 8 / rows), steps, 1e-3)
        assert one.reply.metrics["epsilon"] == pytest.approx(expected, rel=1e-6)
        found[one.client] = one.reply.metrics["epsilon"]
    assert records[2].value("epsilon") == max(found.values())
    assert {metric.name for metric in records[2].metrics if metric.client == "0"} >= {"samples", "epsilon"}


def test_the_largest_epsilon_counts_clients_that_miss_a_round(toy_federation: Make) -> None:
    federation = private(toy_federation, {"participation.clients": 1, "training.rounds": 4})
    values = [record.value("epsilon") for record in run_rounds(federation, Callback())][1:]
    assert values == sorted(values)  # type: ignore[type-var]
    assert len(federation.server.epsilons) > 1
    assert values[-1] == max(federation.server.epsilons.values())


def test_a_client_that_reports_no_epsilon_has_an_unknown_one(toy_federation: Make) -> None:
    federation = private(toy_federation, {"training.rounds": 1})
    inner = federation.engine

    class Silent(Recorder):
        def train(self, *arguments: Any) -> Any:
            for one in inner.train(*arguments):
                silent = replace(one, reply=replace(one.reply, metrics={}))
                yield silent if one.client == "1" else one

    federation.engine = Silent(inner)  # type: ignore[assignment]
    *_, record = run_rounds(federation, Callback())
    assert record.value("epsilon") == math.inf


def test_two_federations_that_differ_in_one_row_differ_by_the_clip_norm_at_most(
    toy_federation: Make,
) -> None:
    """With the same noise, of one step: the trained parameters differ by what one row may change, and all
    else that leaves the client is the same."""
    federation = private(
        toy_federation, {"privacy.sample_rate": 1.0, "training.steps": 1, "training.lr": 1.0}
    )
    rows = federation.clients["0"]
    with_it = visited(federation.learner, rows).reply
    distances = []
    for left_out in range(0, len(rows), 5):
        without = visited(federation.learner, Without(rows, left_out)).reply
        assert (with_it.metrics, with_it.samples) == (without.metrics, without.samples)
        change = vector({**with_it.sent, **with_it.head}) - vector({**without.sent, **without.head})
        distances.append(float(change.norm()))
    bound = 0.5 / 8  # the learning rate is 1 and the denominator 8, whatever the number of rows
    assert 0 < max(distances) <= bound * (1 + 1e-3)


@pytest.mark.parametrize("method", PRIVATE)
def test_every_accepted_method_trains_its_parameters(toy_federation: Make, method: str) -> None:
    federation = private(toy_federation, {"method.name": method, "training.rounds": 1, "training.lr": 0.5})
    model = federation.learner.model
    records = list(run_rounds(federation, Callback()))
    assert records[1].value("epsilon") is not None
    trained = {name: value.detach() for name, value in model.trained_parameters().items()}
    assert any("classifier" in name for name in trained)
    assert all(float(value.norm()) > 0 for value in trained.values())
    assert not any(hasattr(value, "grad_sample") for value in model.model.parameters())


def test_scaffold_and_fedprox_correct_the_noised_gradient(
    toy_table: dict[str, Any], toy_federation: Make
) -> None:
    del toy_table["training"]["max_grad_norm"]
    federation = private(
        toy_federation,
        {"training.scaffold": True, "training.momentum": 0.0, "training.proximal_mu": 0.1},
    )
    list(run_rounds(federation, Callback()))
    assert federation.server.control
    assert all(float(value.norm()) > 0 for value in federation.server.control.values())


def test_a_head_is_trained_at_its_own_learning_rate(toy_table: dict[str, Any], toy_federation: Make) -> None:
    del toy_table["training"]["max_grad_norm"]
    changes = []
    for factor in (None, 4.0):
        rate = {} if factor is None else {"training.head_lr": factor * toy_table["training"]["lr"]}
        federation = private(toy_federation, {"training.steps": 1, "training.rounds": 1, **rate})
        before = vector(federation.server.head).clone()
        list(run_rounds(federation, Callback()))
        changes.append(vector(federation.server.head) - before)
    plain, scaled = changes
    assert float(plain.norm()) > 0
    torch.testing.assert_close(scaled, 4 * plain, rtol=1e-3, atol=1e-5)


def test_a_client_that_would_pass_its_target_takes_part_no_more(toy_federation: Make) -> None:
    federation = private(toy_federation, {"privacy.noise_multiplier": None, "privacy.target_epsilon": 3.0})
    learner, rows = federation.learner, federation.clients["0"]
    ledger = MemoryLedger()
    for round in (0, 1):
        assert visited(learner, rows, ledger, round).reply.metrics["epsilon"] <= 3.0
    assert ledger.releases[-1].epsilon > 2.9
    with pytest.raises(SpentBudgetError, match=r"another release would pass privacy.target_epsilon = 3"):
        visited(learner, rows, ledger, 1)  # a round that is repeated
    assert len(ledger.releases) == 2


def test_training_is_recorded_before_it_begins(toy_federation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    federation, ledger = private(toy_federation), MemoryLedger()

    def crash(*_: Any, **__: Any) -> None:
        assert [one.steps for one in ledger.releases] == [2]
        raise RuntimeError("power cut")

    monkeypatch.setattr("fedsmoothlora.federation.client.train_privately", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        visited(federation.learner, federation.clients["0"], ledger)


def test_a_client_without_its_ledger_sits_out(toy_federation: Make, tmp_path: Path) -> None:
    federation = private(toy_federation)
    federation.states = StoredStates(tmp_path, "")
    shown = Shown()
    rounds = run_rounds(federation, shown)
    next(rounds), next(rounds)
    assert json.loads((tmp_path / "1" / "privacy.json").read_text())["releases"][0]["steps"] == 2
    (tmp_path / "1" / "privacy.json").unlink()
    (tmp_path / "2" / "privacy.json").write_text("{")
    with pytest.raises(StateError, match=r"privacy.json is damaged"):
        next(rounds)
    (tmp_path / "2" / "privacy.json").unlink()

    rounds = run_rounds(federation, shown, resumed=True)
    next(rounds)
    assert set(federation.server.accepted) == {"0", "1", "2"}
    assert {client for client, round in federation.server.accepted.items() if round == 1} == {"0"}
    assert any("client 1 sits out round 2: the record of what it has released lacks round 1" in note
               for note in shown.notes)  # fmt: skip


def test_a_start_may_not_use_a_gradient_of_the_rows(toy_federation: Make) -> None:
    """Also if the method does not declare its calibration batches."""
    federation = private(toy_federation)
    sneaky = methods.find("fedit")()
    original = type(sneaky).start

    class Sneaky(type(sneaky)):  # type: ignore[misc]
        def start(self, client: Any) -> Any:
            client.gradients({})
            return original(self, client)

    with pytest.raises(RuntimeError, match="may not use a gradient of the client's rows"):
        visited(replace(federation.learner, method=Sneaky()), federation.clients["0"])


def test_without_a_seed_noise_and_batches_are_new_in_every_training(toy_federation: Make) -> None:
    federation = private(toy_federation, {"privacy.seed": None})
    one, other = (visited(federation.learner, federation.clients["0"]).reply for _ in range(2))
    assert (vector(one.sent) != vector(other.sent)).all()
    assert one.metrics.keys() == {"epsilon"}
    uniform = secure_uniforms(20_000)
    assert 0 <= uniform.min() < 0.001
    assert 0.999 < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.02


def test_rows_are_drawn_each_by_itself_with_the_rate(toy_federation: Make) -> None:
    learner = private(toy_federation, {"training.steps": 200}).learner
    message = Message(round=0)
    for seed in (None, 5):
        chosen = replace(learner, privacy=replace(learner.privacy, seed=seed))
        dp = chosen._sample_privacy("0", range(40), message, MemoryLedger())  # type: ignore[arg-type]
        assert dp is not None
        counts = [len(rows) for rows in dp.batches(message)]
        assert len(counts) == 200
        assert abs(sum(counts) / 200 - 10) < 1.5
        assert len(set(counts)) > 5


def test_an_objective_without_losses_of_rows_is_refused(toy_federation: Make) -> None:
    from fedsmoothlora.federation.assembly import check_row_losses

    class Own:
        pass

    with pytest.raises(ConfigError, match=r"the objective Own has no losses\(model, batch\)"):
        check_row_losses(private(toy_federation).learner.privacy, Own())  # type: ignore[arg-type]


def test_a_run_in_memory_keeps_what_each_client_has_released(toy_federation: Make) -> None:
    federation = private(toy_federation)
    list(run_rounds(federation, Callback()))
    assert RunContext().states.ledger("0").releases == ()
    for client in federation.clients:
        assert [one.round for one in federation.states.ledger(client).releases] == [0, 1]
