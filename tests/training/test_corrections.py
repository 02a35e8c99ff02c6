"""FedProx and SCAFFOLD against training by hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.settings import UploadSettings
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.federation.uploads import check_replies
from fedsmoothlora.training.corrections import ControlVariates, proximal

Make = Callable[..., Simulation]
SCAFFOLD = {
    "training.scaffold": True,
    "training.momentum": 0.0,
    "training.lr": 0.05,
    "lora.dropout": 0.0,
}


@pytest.fixture
def make(toy_table: dict[str, Any], toy_federation: Make) -> Make:
    del toy_table["training"]["max_grad_norm"]
    return toy_federation


def minimise(target: Tensor, correct: Callable[[], None], theta: nn.Parameter, steps: int, lr: float) -> None:
    """Gradient descent on ``||theta - target||^2 / 2``."""
    for _ in range(steps):
        theta.grad = theta.detach() - target
        correct()
        with torch.no_grad():
            theta.sub_(lr * theta.grad)


def test_the_proximal_gradient_is_mu_times_the_distance_from_the_start() -> None:
    theta, frozen = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.ones(1))
    correct = proximal([theta, frozen], 0.5)
    with torch.no_grad():
        theta += torch.tensor([3.0, 1.0])
    theta.grad = torch.tensor([10.0, 10.0])
    correct()
    assert theta.grad.tolist() == [11.5, 10.5]
    assert frozen.grad is None


def test_a_proximal_client_converges_to_the_minimum_of_the_sum() -> None:
    start, target, mu = torch.tensor([1.0, 0.0]), torch.tensor([-3.0, 5.0]), 3.0
    theta = nn.Parameter(start.clone())
    minimise(target, proximal([theta], mu), theta, 400, 0.1)
    torch.testing.assert_close(theta.detach(), (target + mu * start) / (1 + mu))


def test_control_variates_are_the_mean_gradient_along_the_path() -> None:
    theta = nn.Parameter(torch.tensor([4.0]))
    c, own = {"x": torch.tensor([0.5])}, {"x": torch.tensor([0.2])}
    control = ControlVariates({"x": theta}, c, own)
    target, gradients, lr = torch.tensor([1.0]), [], 0.1
    for _ in range(5):
        gradients.append(float(theta.detach() - target))
        theta.grad = theta.detach() - target
        control.correct()
        assert float(theta.grad) == pytest.approx(gradients[-1] + 0.5 - 0.2)
        with torch.no_grad():
            theta.sub_(lr * theta.grad)
    new, change = control.after(5, lr)
    assert float(new["x"]) == pytest.approx(sum(gradients) / 5, rel=1e-5)
    assert float(change["x"]) == pytest.approx(sum(gradients) / 5 - 0.2, rel=1e-5)


def test_scaffold_finds_the_joint_optimum_where_averaging_drifts() -> None:
    """Two quadratics of unequal curvature: FedAvg with many local steps ends elsewhere (arXiv 1910.06378)."""
    curvatures, targets, steps, lr = (1.0, 10.0), (0.0, 1.0), 10, 0.05
    best = sum(a * b for a, b in zip(curvatures, targets, strict=True)) / sum(curvatures)

    def end(corrected: bool) -> float:
        theta, c, own = torch.zeros(1), {"x": torch.zeros(1)}, [{"x": torch.zeros(1)} for _ in range(2)]
        for _ in range(200):
            ends, changes = [], []
            for i in range(2):
                local = nn.Parameter(theta.clone())
                control = ControlVariates({"x": local}, c, own[i])
                for _ in range(steps):
                    local.grad = curvatures[i] * (local.detach() - targets[i])
                    if corrected:
                        control.correct()
                    with torch.no_grad():
                        local.sub_(lr * local.grad)
                ends.append(local.detach())
                own[i], change = control.after(steps, lr)
                changes.append(change["x"])
            theta = torch.stack(ends).mean(dim=0)
            c = {"x": c["x"] + torch.stack(changes).mean(dim=0)}
        return float(theta)

    assert end(corrected=True) == pytest.approx(best, abs=1e-4)
    assert abs(end(corrected=False) - best) > 0.05


@pytest.mark.parametrize("method", ["fedit", "ffa", "full", "lora_fair", "fed_sb"])
def test_the_servers_variate_is_the_mean_of_the_clients(make: Make, method: str) -> None:
    federation = make({"method.name": method, **SCAFFOLD})
    list(run_rounds(federation, Callback()))
    server = federation.server
    assert server.control
    total = sum(len(rows) for rows in federation.clients.values())
    for name, c in server.control.items():
        mean = torch.zeros_like(c)
        for client, rows in federation.clients.items():
            kept = federation.states.load(client, Callback()).uploads[2][f"control:{name}"]
            assert isinstance(kept, Tensor)
            mean += len(rows) / total * kept
        torch.testing.assert_close(c, mean, rtol=1e-3, atol=1e-5)
        assert float(c.abs().max()) > 0 or name.endswith("lora_A")


def test_with_partial_participation_the_servers_variate_moves_by_the_share_of_clients(make: Make) -> None:
    federation = make(
        {
            "method.name": "fedit",
            "partition.clients": 4,
            "participation.clients": 2,
            "training.rounds": 1,
            **SCAFFOLD,
        }
    )
    list(run_rounds(federation, Callback()))
    changes, samples = [], []
    for client, rows in federation.clients.items():
        state = federation.states.load(client, Callback())
        if state.uploads:
            changes.append(state.uploads[0]["control:classifier.bias"])
            samples.append(len(rows))
    assert len(changes) == 2
    mean = sum(n * change for n, change in zip(samples, changes, strict=True)) / sum(samples)
    assert federation.server.control is not None
    torch.testing.assert_close(federation.server.control["classifier.bias"], 0.5 * mean)


@pytest.mark.parametrize("method", ["fedit", "ffa", "full", "lora_fair"])
def test_scaffold_doubles_the_bytes_and_learns(make: Make, method: str) -> None:
    plain = list(run_rounds(make({"method.name": method, "training.momentum": 0.0}), Callback()))
    records = list(run_rounds(make({"method.name": method, **SCAFFOLD, "training.rounds": 4}), Callback()))
    assert (records[-1].value("loss") or 99) < (records[0].value("loss") or 0)
    assert records[1].value("bytes_up") == 2 * (plain[1].value("bytes_up") or 0)
    assert records[3].value("bytes_down") == 2 * (plain[3].value("bytes_down") or 0)


def test_the_first_step_of_scaffold_in_the_second_round_is_corrected(make: Make) -> None:
    """There is one local step per round, so that the correction can be followed through the federation."""
    federation = make({"method.name": "full", **SCAFFOLD, "training.steps": 1, "training.rounds": 2})
    rounds = run_rounds(federation, Callback())
    next(rounds), next(rounds)
    client, data = next(iter(federation.clients.items()))
    message = federation.server.message(client)
    assert message.control.keys() == federation.server.control.keys()  # type: ignore[union-attr]
    state = federation.states.load(client, Callback())

    def step(**changes: Any) -> Tensor:
        federation.learner.model.backbone.set_shift()
        reply = federation.learner.visit(client, data, replace(message, **changes), state, Callback()).reply
        return reply.head["classifier.bias"]

    lr = 0.05 * (1 + math.cos(math.pi / 2)) / 2
    c = message.control["classifier.bias"]
    moved = step() - step(control={})
    torch.testing.assert_close(moved, -lr * c, rtol=1e-4, atol=1e-7)


def test_a_larger_mu_keeps_clients_nearer_to_their_start(make: Make) -> None:
    def way(mu: float) -> float:
        federation = make({"method.name": "fedit", "training.rounds": 1, "training.proximal_mu": mu})
        client, data = next(iter(federation.clients.items()))
        message = federation.server.message(client)
        reply = federation.learner.visit(client, data, message, ClientState(), Callback()).reply
        return float((reply.head["classifier.weight"] - message.head["classifier.weight"]).norm())

    assert way(10.0) < way(1.0) < way(0.0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda c: {}, "lacks"),
        (lambda c: {**c, "other": torch.zeros(1)}, "unknown"),
        (lambda c: {**c, "classifier.bias": torch.full_like(c["classifier.bias"], math.nan)}, "finite"),
        (lambda c: {**c, "classifier.bias": torch.zeros(2)}, "shape"),
    ],
)
def test_damaged_control_variates_are_refused(
    make: Make, change: Callable[[Any], dict[str, Tensor]], word: str
) -> None:
    federation = make({"method.name": "fedit", **SCAFFOLD})
    server, clients = federation.server, list(federation.clients)
    replies = []
    for client in clients:
        message = server.message(client)
        reply = federation.learner.visit(
            client, federation.clients[client], message, ClientState(), Callback()
        ).reply
        replies.append(reply)
    checked = check_replies(
        replies,
        server.reply_spec({name: len(federation.clients[name]) for name in clients}),
        UploadSettings(),
    )
    assert len(checked.accepted) == 3
    replies[1] = replace(replies[1], control=change(replies[1].control))
    checked = check_replies(
        replies,
        server.reply_spec({name: len(federation.clients[name]) for name in clients}),
        UploadSettings(),
    )
    assert [reply.client for reply, _ in checked.refused] == [clients[1]]
    assert word in checked.refused[0][1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"method.name": "fedsmoothlora"}, ("fedsmoothlora", "use fed_sb, fedit, ffa, full or lora_fair")),
        ({"method.name": "flora"}, ("flora", "meaning")),
        ({"method.name": "fedit", "training.momentum": 0.9}, ("momentum",)),
        ({"method.name": "fedit", "training.max_grad_norm": 1.0}, ("max_grad_norm",)),
        ({"method.name": "fedit", "training.optimizer": "adamw"}, ("sgd",)),
        ({"method.name": "fedit", "training.head_lr": 0.1}, ("head_lr", "one learning rate")),
    ],
)
def test_scaffold_is_refused_where_its_formula_does_not_hold(
    make: Make, toy_table: dict[str, Any], overrides: dict[str, Any], words: Sequence[str]
) -> None:
    wanted = {**SCAFFOLD, **overrides}
    if overrides.get("training.optimizer"):
        del wanted["training.momentum"]
    with pytest.raises(ConfigError) as error:
        read(toy_table, wanted)
    for word in words:
        assert word in str(error.value)
