"""Personal models: Ditto's regulariser, its limits, and what they must not change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import by_family
from fedsmoothlora import methods
from fedsmoothlora.algebra.seeds import generator_for
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.data.examples import BatchOrder
from fedsmoothlora.federation.personal import Deviation
from fedsmoothlora.federation.personal_client import PersonalClient
from fedsmoothlora.federation.records import PERSONAL, TUNED
from fedsmoothlora.federation.round_metrics import personal_at_end
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.serialization import flatten
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.training.corrections import towards
from fedsmoothlora.training.loop import train

Make = Callable[..., Simulation]
GLOBAL = [name for name in methods.names() if methods.find(name).traits.global_model]
SHORT = {
    "training.rounds": 3,
    "training.steps": 2,
    "data.validation": 0.25,
    "evaluation.test": False,
    "lora.dropout": 0.0,
}


class Notes(Callback):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        self.notes.append(text)


def tensors(simulation: Simulation) -> dict[str, bytes]:
    """All that the server has, as bytes."""
    server = simulation.server
    parts = [*server.updates, server.model, server.memory, server.head]
    return {
        f"{index}/{name}": value.numpy().tobytes()
        for index, part in enumerate(parts)
        for name, value in flatten(part).items()
    }


def finish(simulation: Simulation, callback: Callback | None = None) -> list[Any]:
    return list(run_rounds(simulation, callback or Callback()))


def deviation(simulation: Simulation, client: str) -> Deviation:
    state = simulation.states.load(client, Callback())
    return Deviation.kept_in(state.uploads[simulation.server.accepted[client]])


# -- the regulariser


def test_the_regulariser_adds_the_gradient_of_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    B, A, h, centre = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((5, 2), (2, 4), (3,), (3,))
    )
    parameters = [nn.Parameter(value) for value in (B, A, h)]
    scale, weight = 1.5, 0.7
    term = (
        weight
        / 2
        * ((scale * parameters[0] @ parameters[1]).square().sum() + (parameters[2] - centre).square().sum())
    )
    wanted = torch.autograd.grad(term, parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    towards([(parameters[0], parameters[1], scale)], [(parameters[2], centre)], weight)()
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def quadratic(weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise ``1/2 ||V - T||^2 + weight/2 ||V - W||^2`` with LoRA of full rank: ``V``, ``W`` and ``T``."""
    generator = torch.Generator().manual_seed(1)
    W, T, A = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (4, 3), (3, 3))
    )
    B = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    A = nn.Parameter(torch.linalg.qr(A).Q)
    scale = 1.5
    correct = towards([(B, A, scale)], [], weight)
    optimizer = torch.optim.SGD([B, A], lr=0.1 / (1 + weight))
    for _ in range(600):
        optimizer.zero_grad()
        ((W + scale * B @ A - T).square().sum() / 2).backward()
        correct()
        optimizer.step()
    return (W + scale * B @ A).detach(), W, T


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 20.0])
def test_a_quadratic_ends_at_its_closed_form(weight: float) -> None:
    V, W, T = quadratic(weight)
    torch.testing.assert_close(V, (T + weight * W) / (1 + weight), rtol=1e-6, atol=1e-6)


# -- in a federation


@pytest.mark.parametrize("name", by_family(GLOBAL))
def test_personal_models_change_nothing_else(name: str, toy_federation: Make) -> None:
    plain = toy_federation({"method.name": name, **SHORT})
    without = finish(plain)
    personal = toy_federation(
        {"method.name": name, **SHORT, "personal.ditto": 0.1, "evaluation.personal_steps": 1}
    )
    with_them = finish(personal)
    record = personal_at_end(personal, Callback())
    assert tensors(personal) == tensors(plain)
    names = {metric.name for metric in record.metrics}
    assert {f"{PERSONAL}accuracy", f"{TUNED}accuracy"} <= names

    def shared(records: list[Any]) -> list[Any]:
        return [
            (m.client, m.name, m.value)
            for r in records
            for m in r.metrics
            if not m.name.startswith((PERSONAL, "seconds"))
        ]

    assert shared(with_them) == shared(without)


@pytest.mark.parametrize("name", by_family(GLOBAL))
def test_a_personal_model_deviates_from_the_global_model_of_the_round(
    name: str, toy_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = toy_federation({"method.name": name, **SHORT, "personal.ditto": 0.1})
    checked = 0
    after = PersonalClient.after

    def spied(client: PersonalClient, visit: Any, message: Any, state: Any, callback: Any) -> Any:
        nonlocal checked
        at, server = visit.at, simulation.server
        for layer in server.layers:
            shape = (server.layers[layer].m, server.layers[layer].n)
            mine = at.lora[layer].dense() if layer in at.lora else torch.zeros(shape)
            theirs = server.model[layer].dense() if layer in server.model else torch.zeros(shape)
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert at.head.keys() == server.head.keys()
        for key, value in at.head.items():
            torch.testing.assert_close(value, server.head[key])
        checked += 1
        return after(client, visit, message, state, callback)

    monkeypatch.setattr(PersonalClient, "after", spied)
    finish(simulation)
    assert checked >= 2 * len(simulation.clients)


# One plain step after the other, so that the regulariser alone decides where training ends.
PLAIN = {
    **SHORT,
    "method.name": "fedit",
    "training.rounds": 1,
    "training.momentum": 0.0,
    "training.max_grad_norm": None,
    "training.lr": 0.001,
    "partition": {"kind": "iid", "clients": 3},
}
STEPS = {"personal.steps": 12}


def norm(simulation: Simulation) -> float:
    """The norm of all clients' deviations."""
    found = [deviation(simulation, client) for client in simulation.clients]
    products = [product.dense().square().sum() for one in found for product in one.lora.values()]
    heads = [value.square().sum() for one in found for value in one.head.values()]
    return math.sqrt(sum(map(float, [*products, *heads])))


def test_a_large_lambda_gives_the_global_model(toy_federation: Make) -> None:
    norms = []
    for weight in (0.0, 300.0):
        simulation = toy_federation({**PLAIN, **STEPS, "personal.ditto": weight})
        finish(simulation)
        norms.append(norm(simulation))
    assert 0 < norms[1] < 0.4 * norms[0]


def test_lambda_0_is_local_training_from_the_global_model(toy_federation: Make) -> None:
    """The deviation equals what the training loop makes of the pretrained model with the same batches."""
    simulation = toy_federation({**PLAIN, **STEPS, "personal.ditto": 0.0})
    finish(simulation)
    alone = toy_federation(PLAIN)
    learner, model, client = alone.learner, alone.learner.model, next(iter(alone.clients))
    model.load_lora({name: learner.initial_state.initial(name) for name in model.layers})
    model.train_only(("B", "A"))
    data, seed = alone.clients[client], learner.initial_state.seed
    order = BatchOrder(len(data), 8, generator_for(seed, "personal", 0, 0, client))
    train(
        model.model,
        (data.batch(rows) for rows in order.take(12)),
        lambda batch: learner.objective.loss(model.model, batch),
        learner.training,
        lr=0.001,
        accelerator=learner.accelerator,
        seed=0,
    )
    found = deviation(simulation, client)
    for name, product in model.lora().items():
        assert torch.equal(found.lora[name].B, product.B)
        assert torch.equal(found.lora[name].A, product.A)
    for name, value in model.head().items():
        assert torch.equal(found.head[name], value - learner.initial_state.head[name])


def test_a_personal_model_that_diverges_stays_as_it_was(toy_federation: Make) -> None:
    notes = Notes()
    plain, simulation = toy_federation(PLAIN), toy_federation({**PLAIN, **STEPS, "personal.ditto": 1e12})
    finish(plain)
    records = finish(simulation, notes)
    assert tensors(simulation) == tensors(plain)
    assert norm(simulation) == 0
    told = [note for note in notes.notes if "its personal model diverged in round 1 and stays" in note]
    assert len(told) == len(simulation.clients)
    assert "a smaller personal.ditto than 1e+12" in told[0]
    values = {(m.client, m.name): m.value for m in records[0].metrics}
    after = {(m.client, m.name): m.value for m in records[1].metrics}
    for client in simulation.validation:
        # At the start of the round, the global model was the pretrained one.
        assert after[client, f"{PERSONAL}loss"] == values[client, "loss"]


def test_a_client_that_never_took_part_has_the_global_model(toy_federation: Make) -> None:
    overrides = {**PLAIN, "participation.clients": 1, "personal.ditto": 0.1}
    simulation = toy_federation(overrides)
    last = finish(simulation)[-1]
    final = {(m.client, m.name): m.value for m in personal_at_end(simulation, Callback()).metrics}
    absent = simulation.clients.keys() - simulation.server.accepted.keys()
    assert len(absent) == 2
    for metric in last.metrics:
        if metric.client in absent and metric.name in ("loss", "accuracy"):
            assert final[metric.client, f"{PERSONAL}{metric.name}"] == pytest.approx(metric.value, rel=1e-6)


def test_a_deviation_is_kept_with_the_last_accepted_upload(toy_federation: Make) -> None:
    """A repeated or refused round begins from the deviation before it."""
    simulation = toy_federation({**PLAIN, "training.rounds": 2, "personal.ditto": 0.1})
    finish(simulation)
    client = next(iter(simulation.clients))
    state = simulation.states.load(client, Callback())
    first, second = (Deviation.kept_in(state.uploads[round]) for round in (0, 1))
    assert any(not torch.equal(first.lora[name].B, second.lora[name].B) for name in first.lora)
    message = simulation.server.message(client)
    assert message.accepted_round == 1
    for accepted, wanted in ((1, second), (0, first), (-1, Deviation())):
        personal = simulation.learner.personal_client(client, simulation.clients[client])
        found = personal.deviation(replace(message, accepted_round=accepted), state)
        assert found.lora.keys() == wanted.lora.keys()
        assert all(torch.equal(found.lora[name].B, wanted.lora[name].B) for name in wanted.lora)


def test_a_personal_head_is_trained_at_its_own_learning_rate(toy_federation: Make) -> None:
    found = []
    for own in ({}, {"training.head_lr": 0.004}):  # four times training.lr
        simulation = toy_federation({**PLAIN, "personal.steps": 1, "personal.ditto": 0.0, **own})
        finish(simulation)
        found.append(deviation(simulation, "0"))
    plain, scaled = found
    assert plain.head
    for name, value in plain.head.items():
        torch.testing.assert_close(scaled.head[name], 4 * value, rtol=1e-3, atol=1e-6)
    for name, product in plain.lora.items():
        torch.testing.assert_close(scaled.lora[name].dense(), product.dense())


@pytest.mark.parametrize("bits", [pytest.param(16, marks=pytest.mark.slow), 4])
def test_personal_models_with_coded_transport_deviate_from_the_decoded_global_model(
    bits: int, toy_federation: Make
) -> None:
    overrides = {**SHORT, "method.name": "fedit", "transport.bits": bits}
    plain, simulation = toy_federation(overrides), toy_federation({**overrides, "personal.ditto": 0.1})
    finish(plain)
    finish(simulation)
    assert tensors(simulation) == tensors(plain)
    assert norm(simulation) > 0


def test_fine_tuning_helps_clients_whose_rows_differ(toy_federation: Make) -> None:
    overrides = {
        **SHORT,
        "method.name": "fedit",
        "partition": {"kind": "pathological", "clients": 4, "classes_per_client": 1},
        "training.rounds": 1,
        "personal.ditto": 0.01,
        "personal.steps": 20,
        "evaluation.personal_steps": 20,
    }
    simulation = toy_federation(overrides)
    last = finish(simulation)[-1]
    final = personal_at_end(simulation, Callback())

    def mean(metrics: Any, name: str) -> float:
        return fmean(m.value for m in metrics if m.client is not None and m.name == name)

    before = mean(last.metrics, "accuracy")
    assert mean(final.metrics, f"{TUNED}accuracy") > before + 0.3
    assert mean(final.metrics, f"{PERSONAL}accuracy") > before + 0.3
