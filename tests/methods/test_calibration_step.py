"""``calibration_step``: the first step of a round is one with the calibration gradient."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import pytest
import torch

from fedsmoothlora.algebra.alignment import factor_gradients
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.client_round import ClientRound
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.methods import Layer
from fedsmoothlora.methods.fedsmoothlora import FedSmoothLoRA

LAYERS = {"w": Layer("w", 12, 10, 2, scale=2.0, gradient_rank=10)}
PLAIN = {
    "lora.dropout": 0.0,
    "model.head": "lora",
    "lora.head_r": 1,
    "method.zeta": 0.0,
    "method.calibration_batches": 1,
}
Federation = Callable[..., Simulation]


def test_the_gradients_of_the_factors_are_those_of_autograd() -> None:
    draw = torch.Generator().manual_seed(0)
    W, X = torch.randn(6, 5, generator=draw), torch.randn(9, 5, generator=draw)
    B, A = torch.randn(6, 2, generator=draw), torch.randn(2, 5, generator=draw)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return (X @ weight.mT).sin().square().mean()

    B, A = B.requires_grad_(), A.requires_grad_()
    whole = (W + 3.0 * B @ A).detach().requires_grad_()
    loss(W + 3.0 * B @ A).backward()
    loss(whole).backward()
    assert whole.grad is not None
    found = factor_gradients(whole.grad, LowRank(B.detach(), A.detach()), 3.0)
    torch.testing.assert_close(found.B, B.grad)
    torch.testing.assert_close(found.A, A.grad)


def sent(simulation: Simulation) -> dict[str, torch.Tensor]:
    """The upload of client 0 in the first round, as dense matrices."""
    message = simulation.server.message("0")
    visit = simulation.learner.visit("0", simulation.clients["0"], message, ClientState(), Callback())
    return {name: value.dense() for name, value in visit.reply.sent.items() if isinstance(value, LowRank)}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_is_the_step_of_a_training_that_begins_with_the_calibration_batch(
    optimizer: str, toy_federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is ordinary training with the calibration batch as its first batch."""
    chosen = {**PLAIN, "training.optimizer": optimizer, "training.lr": 0.01}
    found = sent(toy_federation({**chosen, "method.calibration_step": True, "training.steps": 2}))
    without = sent(toy_federation({**chosen, "training.steps": 2}))
    real = ClientRound.batches

    def batches(self: ClientRound, count: int, purpose: str, batch_size: int) -> Iterator[Any]:
        if purpose != "training":
            return real(self, count, purpose, batch_size)
        first = real(self, 1, "calibration", batch_size)
        return chain(first, real(self, count - 1, purpose, batch_size))

    monkeypatch.setattr(ClientRound, "batches", batches)
    wanted = sent(toy_federation({**chosen, "training.steps": 3}))
    for name, matrix in wanted.items():
        size = float(matrix.norm())
        assert float((found[name] - matrix).norm()) <= 2e-3 * size
        assert float((without[name] - matrix).norm()) > 0.05 * size


def test_as_many_batches_are_read_as_without_it(
    toy_federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, read = ClientRound.batches, []

    def batches(self: ClientRound, count: int, purpose: str, batch_size: int) -> Iterator[Any]:
        for batch in real(self, count, purpose, batch_size):
            read.append(purpose)
            yield batch

    monkeypatch.setattr(ClientRound, "batches", batches)
    chosen = {"training.steps": 5, "training.count_calibration": True, "method.zeta": 0.0}
    for extra in ({}, {"method.calibration_step": True}):
        sent(toy_federation({**chosen, **extra}))
        assert read == ["calibration"] * 2 + ["training"] * 3
        read.clear()


def test_a_head_that_is_trained_whole_trains_on_the_batches_alone(toy_federation: Federation) -> None:
    """The step has no gradient of the head, and the optimiser skips it."""
    heads = []
    for lr in (0.02, 1e-30):  # so small that nothing moves
        simulation = toy_federation(
            {"method.zeta": 0.0, "method.calibration_step": True, "training.steps": 1, "training.lr": lr}
        )
        message = simulation.server.message("0")
        visit = simulation.learner.visit("0", simulation.clients["0"], message, ClientState(), Callback())
        assert all(bool(torch.isfinite(value).all()) for value in visit.reply.head.values())
        heads.append(visit.reply.head)
    assert not torch.equal(heads[0]["classifier.weight"], heads[1]["classifier.weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_aligned": "random", "zeta": 0.0}, "own calibration gradient"),
        ({"gradient_aligned": "shared", "zeta": 0.0}, "own calibration gradient"),
        ({"gradient": "sketch", "zeta": 0.0, "sketch_width": 2}, "own calibration gradient"),
        ({}, r"method\.zeta = 0 or method\.start"),
        ({"zeta": 0.0, "zeta_schedule": "linear", "zeta_floor": 0.5}, r"method\.zeta = 0"),
    ],
    ids=["random", "shared", "sketch", "round matching", "a schedule that rises"],
)
def test_it_is_refused_where_the_gradient_is_not_that_of_the_start(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        FedSmoothLoRA(calibration_step=True, **options).check(LAYERS, partial=False)
    FedSmoothLoRA(calibration_step=True, start_mode="exact").check(LAYERS, partial=False)
    FedSmoothLoRA(calibration_step=True, round_matching=False).check(LAYERS, partial=True)
