"""One client alone, whose training is done again by hand with plain SGD on a formula of the test."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsmoothlora.federation.simulation import Simulation

ROUNDS, STEPS, LR = 3, 2, 0.05
Batches = list[dict[str, Tensor]]


def lone(make: Callable[..., Simulation], overrides: dict[str, Any]) -> Simulation:
    training = {"rounds": ROUNDS, "steps": STEPS, "batch_size": 8, "lr": LR, "momentum": 0.0}
    partition = {"kind": "iid", "clients": 1}
    return make({"partition": partition, "lora.dropout": 0.0, "training": training, **overrides})


def recorded(federation: Simulation) -> Batches:
    """The batches that the client will be asked for, as they come."""
    (client, rows), *_ = federation.clients.items()
    batches: Batches = []

    class Recorded:
        def __len__(self) -> int:
            return len(rows)

        def batch(self, indices: Any) -> dict[str, Tensor]:
            batches.append(rows.batch(indices))  # type: ignore[arg-type]
            return batches[-1]

    federation.clients = {client: Recorded()}
    return batches


def trained_by_hand(
    federation: Simulation,
    batches: Batches,
    rounds: Sequence[int],
    product: Callable[[str], Tensor],
    parameters: Callable[[], Iterable[Tensor]],
    after_round: Callable[[], None] = lambda: None,
) -> None:
    """Train the parameters of each layer's ``product`` and the head, and compare with the federation's model.

    Args:
        federation: a federation whose rounds are done.
        batches: the client's batches, those of the training rounds last.
        rounds: the rounds that train.
        product: a layer's global product, over ``s``, from the parameters.
        parameters: the trained parameters.
        after_round: called after every round.
    """
    server, model = federation.server, federation.learner.model
    initial = federation.learner.initial_state.head
    head = {name: value.clone().requires_grad_() for name, value in initial.items()}
    taken = batches[-STEPS * len(rounds) :]
    with model.without_lora():
        model.backbone.set_shift({})
        weights = {name: model.backbone.pretrained(name).clone() for name in server.layers}
        for place, t in enumerate(rounds):
            rate = LR / 2 * (1 + np.cos(np.pi * t / ROUNDS))
            for batch in taken[STEPS * place : STEPS * (place + 1)]:
                own = {
                    f"{name}.base_layer.weight": weights[name] + layer.scale * product(name)
                    for name, layer in server.layers.items()
                }
                logits = torch.func.functional_call(
                    model.model, {**own, **head}, kwargs={"pixel_values": batch["pixel_values"]}
                ).logits
                loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
                trained = [*parameters(), *head.values()]
                for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                    with torch.no_grad():
                        parameter -= rate * gradient
            after_round()
    for name, found in server.model.items():
        want = product(name).detach()
        torch.testing.assert_close(found.dense(), want, rtol=1e-4, atol=1e-6)
        assert float(want.norm()) > 1e-4
    for name, value in server.head.items():
        torch.testing.assert_close(value, head[name].detach(), rtol=1e-4, atol=1e-6)
