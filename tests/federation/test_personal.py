"""Personal models: Ditto's regulariser, its limits, and what they must not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import by_family
from fedsmoothlora import methods
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.personal import Deviation
from fedsmoothlora.federation.records import PERSONAL, TUNED
from fedsmoothlora.federation.round_metrics import personal_at_end
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.serialization import flatten
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.training.corrections import towards

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
    """Minimise ``1/2 ||V - T||^2 + weight/2 ||V - W||^2``: ``V``, ``W`` and ``T``; ``T - W`` has rank 2."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    columns, rows = torch.linalg.qr(draw(4, 2)).Q, torch.linalg.qr(draw(3, 2)).Q
    W = draw(4, 3)
    T = W + columns @ torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64)) @ rows.mT
    B, A = nn.Parameter(torch.zeros(4, 2, dtype=torch.float64)), nn.Parameter(draw(2, 3))
    scale = 1.5
    correct = towards([(B, A, scale)], [], weight)
    optimizer = torch.optim.SGD([B, A], lr=0.05)
    for _ in range(1500):
        optimizer.zero_grad()
        ((W + scale * B @ A - T).square().sum() / 2).backward()
        correct()
        optimizer.step()
    return (W + scale * B @ A).detach(), W, T


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
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
@pytest.mark.parametrize("head", ["full", "lora"])
def test_a_personal_model_deviates_from_the_global_model_of_the_round(
    name: str, head: str, toy_federation: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = toy_federation({"method.name": name, **SHORT, "personal.ditto": 0.1, "model.head": head})
    checked = 0
    personalise = Learner.personalise

    def spied(
        learner: Learner, client: str, data: Any, message: Any, state: Any, visit: Any, callback: Any
    ) -> Any:
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
        return personalise(learner, client, data, message, state, visit, callback)

    monkeypatch.setattr(Learner, "personalise", spied)
    finish(simulation)
    assert checked >= 2 * len(simulation.clients)
