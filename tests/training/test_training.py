import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from fake_device import FAKE, HOST_READS, FakeAccelerator, FakeDevice
from fedsmoothlora.errors import DivergedError
from fedsmoothlora.training.loop import train
from fedsmoothlora.training.settings import TrainingSettings

Batch = dict[str, Tensor]


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Linear(8, 8)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(8, 3)
        self.norm.requires_grad_(False)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.dropout(torch.tanh(self.frozen(self.norm(x)))))


def net(dropout: float = 0.0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(dropout)


def batches(count: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(5, 8, generator=generator),
            "labels": torch.randint(0, 3, (5,), generator=generator),
        }
        for _ in range(count)
    ]


def run(
    model: Net,
    data: list[Batch],
    seed: int = 7,
    lr: float = 0.1,
    head: Sequence[nn.Parameter] = (),
    lr_first: float = 0.1,
    **settings: object,
) -> list[float]:
    return train(
        model,
        data,
        lambda batch: functional.cross_entropy(model(batch["x"]), batch["labels"]),
        TrainingSettings(lr=lr_first, **settings),  # type: ignore[arg-type]
        lr=lr,
        accelerator=Accelerator(cpu=True),
        seed=seed,
        head=head,
    )


def sgd_by_hand(model: Net, momentum: float, decay: float, clip: float | None) -> list[float]:
    """The textbook update: ``v = momentum v + g``, ``w -= lr v``."""
    model.eval()
    weights = [model.out.weight, model.out.bias]
    velocity: list[Tensor | None] = [None, None]
    losses = []
    for batch in batches():
        loss = functional.cross_entropy(model(batch["x"]), batch["labels"])
        losses.append(loss.item())
        gradients = list(torch.autograd.grad(loss, weights))
        if clip is not None:
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
            gradients = [g * torch.clamp(clip / (norm + 1e-6), max=1.0) for g in gradients]
        with torch.no_grad():
            for i, weight in enumerate(weights):
                g = gradients[i].add(weight, alpha=decay) if decay else gradients[i]
                v = velocity[i]
                velocity[i] = g.clone() if v is None else v.mul(momentum).add(g)
                weight.add_(velocity[i], alpha=-0.1)
    return losses


@pytest.mark.parametrize(
    ("settings", "momentum", "decay", "clip"),
    [
        ({}, 0.9, 0.0, None),
        ({"momentum": 0.0}, 0.0, 0.0, None),
        ({"momentum": 0.5, "weight_decay": 0.1}, 0.5, 0.1, None),
        ({"max_grad_norm": 0.05}, 0.9, 0.0, 0.05),
    ],
)
def test_sgd_is_the_textbooks_bit_for_bit(
    settings: dict, momentum: float, decay: float, clip: float | None
) -> None:
    model, reference = net(), net()
    wanted = sgd_by_hand(reference, momentum, decay, clip)
    assert run(model, batches(), **settings) == wanted
    assert torch.equal(model.out.weight, reference.out.weight)
    assert torch.equal(model.out.bias, reference.out.bias)


def test_adamw_is_torchs_bit_for_bit() -> None:
    model, reference = net(), net().eval()
    optimizer = torch.optim.AdamW([reference.out.weight, reference.out.bias], lr=0.1, weight_decay=0.02)
    wanted = []
    for batch in batches():
        optimizer.zero_grad()
        loss = functional.cross_entropy(reference(batch["x"]), batch["labels"])
        loss.backward()
        nn.utils.clip_grad_norm_(reference.out.parameters(), 0.3)
        optimizer.step()
        wanted.append(loss.item())
    assert run(model, batches(), optimizer="adamw", weight_decay=0.02, max_grad_norm=0.3) == wanted
    assert torch.equal(model.out.weight, reference.out.weight)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_head_has_its_own_multiple_of_the_rounds_learning_rate(optimizer: str) -> None:
    model, reference = net(), net().eval()
    rates = {"out.weight": 0.05, "out.bias": 0.2}  # in a round at half of the first learning rate
    made = {
        "sgd": partial(torch.optim.SGD, momentum=0.9),
        "adamw": partial(torch.optim.AdamW, weight_decay=0),
    }
    alone = [made[optimizer]([reference.get_parameter(name)], lr=lr) for name, lr in rates.items()]
    for batch in batches():
        functional.cross_entropy(reference(batch["x"]), batch["labels"]).backward()
        for one in alone:
            one.step()
            one.zero_grad()
    run(model, batches(), lr=0.05, head=[model.out.bias], optimizer=optimizer, head_lr=0.4)
    assert torch.equal(model.out.weight, reference.out.weight)
    assert torch.equal(model.out.bias, reference.out.bias)


def test_a_head_with_the_learning_rate_of_the_rest_changes_no_bit() -> None:
    one, other = net(), net()
    wanted = run(one, batches(), lr=0.1, lr_first=0.1, head=[one.out.bias])
    assert run(other, batches(), lr=0.1, lr_first=0.1, head=[other.out.bias], head_lr=0.1) == wanted
    assert torch.equal(one.out.weight, other.out.weight)
    assert torch.equal(one.out.bias, other.out.bias)


def test_every_call_starts_with_a_fresh_optimiser() -> None:
    model, reference = net(), net()
    run(model, batches(3))
    run(model, batches(1))
    run(reference, batches(3))
    before = reference.out.weight.detach().clone()
    batch = batches(1)[0]
    loss = functional.cross_entropy(reference(batch["x"]), batch["labels"])
    gradient = torch.autograd.grad(loss, reference.out.weight)[0]
    assert torch.equal(model.out.weight, before.add(gradient, alpha=-0.1))


DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: float(np.random.rand()),  # noqa: NPY002
    "python": random.random,
}


@pytest.mark.parametrize("source", DRAWS)
def test_draws_of_a_model_are_decided_by_the_seed_alone(source: str) -> None:
    """As SpecAugment of Wav2Vec2 draws from NumPy's generator."""
    draw = DRAWS[source]

    def losses(seed: int) -> list[float]:
        model = net()
        model.frozen.register_forward_hook(lambda module, inputs, output: output * draw())
        return run(model, batches(), seed=seed)

    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    expected = [draw(), draw()]
    random.seed(0)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    first = draw()
    one, same, other = losses(1), losses(1), losses(2)
    assert one == same
    assert one != other
    assert [first, draw()] == expected  # the state is restored


def test_dropout_is_decided_by_the_seed_alone() -> None:
    first, again, other = net(0.5), net(0.5), net(0.5)
    torch.manual_seed(1)
    run(first, batches(), seed=7)
    torch.manual_seed(2)
    run(again, batches(), seed=7)
    run(other, batches(), seed=8)
    assert torch.equal(first.out.weight, again.out.weight)
    assert not torch.equal(first.out.weight, other.out.weight)


def test_the_global_generator_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    run(net(0.5), batches())
    bad = batches()
    bad[2]["x"][0, 0] = math.nan
    with pytest.raises(DivergedError):
        run(net(0.5), bad)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_frozen_weights_and_running_statistics_are_unchanged() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(model, [{**batch, "x": batch["x"] + 5} for batch in batches()])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"out.weight", "out.bias"}


def test_a_loss_that_is_not_finite_stops_the_client_at_its_step() -> None:
    bad = batches()
    bad[2]["x"][0, 0] = math.nan
    with pytest.raises(DivergedError, match="the loss is nan at step 3"):
        run(net(), bad)


def test_weights_that_are_not_finite_after_the_last_step_count_as_diverged() -> None:
    # One step: the loss, taken before it, is still finite.
    with pytest.raises(DivergedError, match="not finite after step 1"):
        run(net(), batches(1), lr=math.inf)


def test_no_gradient_is_left_behind() -> None:
    model = net()
    run(model, batches())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_count_calibration_subtracts_calibration_batches_from_steps() -> None:
    counted = TrainingSettings(batch_size=10, count_calibration=True)
    assert counted.steps_for(100, calibration=4) == 6
    assert counted.steps_for(100) == 10
    assert counted.steps_for(20, calibration=4) == 1
    assert TrainingSettings(batch_size=10).steps_for(100, calibration=4) == 10


@pytest.mark.parametrize(
    ("settings", "rows", "steps"),
    [
        ({}, 64, 1),
        ({}, 65, 2),
        ({"epochs": 3, "batch_size": 10}, 21, 9),
        ({"steps": 4, "batch_size": 10}, 1000, 4),
        ({"batch_size": 10}, 1, 1),
    ],
)
def test_steps_are_the_configured_number_or_whole_passes(settings: dict, rows: int, steps: int) -> None:
    assert TrainingSettings(**settings).steps_for(rows) == steps


def accelerated_run(
    model: Net, data: list[Batch], events: list[str] | None = None, **settings: object
) -> list[float]:
    """Training on the made-up accelerator, with a log of losses computed and losses read."""
    logged = [] if events is None else events

    def loss(batch: Batch) -> Tensor:
        logged.append("computed")
        return functional.cross_entropy(model(batch["x"].to(FAKE)), batch["labels"].to(FAKE))

    def split(batch: Batch) -> list[tuple[Batch, float]]:
        parts = torch.arange(5).split(3)
        return [({name: value[rows] for name, value in batch.items()}, len(rows) / 5) for rows in parts]

    with FakeDevice():
        model.to(FAKE)
        HOST_READS.clear()
        return train(
            model,
            data,
            loss,
            TrainingSettings(**settings),  # type: ignore[arg-type]
            lr=0.1,
            accelerator=FakeAccelerator(),
            seed=7,
            split=split,
            on_step=lambda loss: logged.append("read"),
        )


def test_an_accelerator_is_read_once_a_step_and_one_step_late() -> None:
    events: list[str] = []
    losses = accelerated_run(net(), batches(3), events, max_grad_norm=1.0)
    step = ["computed", "computed"]  # two parts
    assert events == [*step, *step, "read", *step, "read", "read"]
    assert len(HOST_READS) == 3 + 1  # and whether the trained weights are finite
    assert losses == pytest.approx(run(net(), batches(3), max_grad_norm=1.0), rel=1e-5)


def test_a_loss_that_is_read_late_is_reported_for_its_own_step() -> None:
    data = batches(5)
    data[1]["x"][0, 0] = math.nan
    with pytest.raises(DivergedError, match="the loss is nan at step 2"):
        accelerated_run(net(), data)
    with pytest.raises(DivergedError, match="the loss is nan at step 1"):
        accelerated_run(net(), data[1:2])  # read after the last step


class Averaging(nn.Module):
    """Buffers that training changes, none of them of a layer that `still_normalisation` stops."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(1, track_running_stats=True)
        self.out = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(dim=0)
        return self.out(self.norm(x[:, None])[:, 0] - self.mean)


def test_buffers_are_as_they_were_before_training() -> None:
    """They belong to no upload, so those of a client would reach the next one and not a checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = Averaging()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weight = model.out.parametrizations.weight.original.detach().clone()
    run(model, batches())
    assert not torch.equal(model.out.parametrizations.weight.original, weight)
    assert len(before) == 6
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
