"""`training.class_weights`: against scikit-learn's weights and torch's weighted loss."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read, to_toml
from fedsmoothlora.data.examples import Vectors, labels_of
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.runs.federation import Federation
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.tasks.objectives import Classification
from fedsmoothlora.tasks.objectives.class_weights import class_weights
from fedsmoothlora.training.calibration import calibration_gradients
from fedsmoothlora.training.loop import to_device

CLASSES = 4
LABELS = st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=30)
TABLE = {"0": 0.5, "1": 3.0, "2": 1.0, "3": 7.25}


def logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(rows))


@given(LABELS)
def test_balanced_weights_are_scikit_learn_s_and_0_for_a_class_that_the_client_lacks(
    labels: list[int],
) -> None:
    present = np.unique(labels)
    wanted = np.zeros(CLASSES)
    wanted[present] = compute_class_weight("balanced", classes=present, y=labels)
    got = class_weights(torch.tensor(labels), "balanced", ["a", "b", "c", "d"])
    assert got.tolist() == pytest.approx(wanted.tolist())


@settings(deadline=None)
@given(LABELS, LABELS, st.sampled_from(["balanced", TABLE]), st.integers(1, 6))
def test_the_loss_and_its_parts_are_torch_s_weighted_mean(
    own: list[int], drawn: list[int], weights: Any, parts: int
) -> None:
    labels = torch.tensor([own[index % len(own)] for index in drawn])  # a batch of the client's rows
    objective = Classification().weighted(torch.tensor(own), weights)
    batch = {"inputs": logits(len(labels)), "labels": labels}
    weight = class_weights(torch.tensor(own), weights, list(TABLE))
    wanted = nn.CrossEntropyLoss(weight)(batch["inputs"], labels)
    torch.testing.assert_close(objective.loss(nn.Identity(), batch), wanted)
    shares = objective.parts(batch, parts)
    assert sum(share for _, share in shares) == pytest.approx(1)
    summed = torch.stack([objective.loss(nn.Identity(), part) * share for part, share in shares]).sum()
    torch.testing.assert_close(summed, wanted, rtol=1e-5, atol=1e-6)


def test_evaluation_does_not_weigh_classes() -> None:
    rows = Vectors(logits(20), torch.arange(20) % CLASSES)
    plain = Classification()
    found, wanted = (
        one.evaluate(nn.Identity(), rows, 7, lambda batch: batch)
        for one in (plain.weighted(torch.tensor([0, 0, 1]), "balanced"), plain)
    )
    assert found.metrics == wanted.metrics


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_calibration_gradient_is_that_of_the_weighted_loss(
    toy_federation: Callable[..., Simulation], accumulation: int
) -> None:
    federation = toy_federation(
        {"training.class_weights": "balanced", "training.accumulation": accumulation, "lora.dropout": 0.0}
    )
    rows = federation.clients["0"]
    learner = federation.learner.for_rows(rows)
    model = learner.model
    batch = to_device(rows.batch(range(len(rows))), learner.accelerator)
    weight = class_weights(labels_of(rows), "balanced", ["rows", "columns", "checks", "plain"])
    with model.without_lora():
        got = calibration_gradients(model.model, model.modules, [batch], learner.loss, learner.loss.split)
        for module in model.modules.values():
            module.weight.requires_grad_(True)
        output = model.model.eval()(pixel_values=batch["pixel_values"]).logits
        nn.CrossEntropyLoss(weight)(output, batch["labels"]).backward()
    for name, module in model.modules.items():
        torch.testing.assert_close(got[name], module.weight.grad, rtol=1e-3, atol=1e-6)


def trained(federation: Simulation) -> dict[str, float]:
    message = federation.server.message("0")
    reply = federation.learner.visit("0", federation.clients["0"], message, ClientState(), Callback()).reply
    return {name: value for name, value in reply.metrics.items() if not name.startswith("seconds")}


def test_a_client_trains_with_weights_of_its_own_rows(toy_federation: Callable[..., Simulation]) -> None:
    names = ("rows", "columns", "checks", "plain")
    plain, alike, balanced = (
        trained(toy_federation({"training.class_weights": weights} if weights else {}))
        for weights in (None, dict.fromkeys(names, 3.0), "balanced")
    )
    assert alike == pytest.approx(plain, rel=1e-4)
    assert balanced["train_loss"] != pytest.approx(plain["train_loss"], rel=1e-4)


def test_a_table_of_weights_is_kept_with_the_run(toy_table: dict[str, Any]) -> None:
    weights = {"rows": 1.0, "columns": 2.5, "checks": 1.0, "plain": 4.0}
    config = read(toy_table, {"training.class_weights": weights})
    assert read(tomllib.loads(to_toml(config))) == config
    assert config.training.class_weights == weights


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"rows": 1.0, "columns": 1.0, "checks": 1.0}, "no weight for the class 'plain'"),
        (
            {"rows": 1.0, "columns": 1.0, "checks": 1.0, "plain": 1.0, "plane": 1.0},
            "names the class 'plane'; the classes are rows, columns, checks, plain",
        ),
        ({"rows": 0.0, "columns": 1.0, "checks": 1.0, "plain": 1.0}, "greater than 0"),
        ("even", "training.class_weights = 'even'"),
    ],
)
def test_weights_that_do_not_fit_the_classes_are_refused(
    toy_table: dict[str, Any], weights: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(read(toy_table, {"training.class_weights": weights}))


def test_a_task_without_classes_has_no_class_weights(tiny_llama: Path) -> None:
    table = {"name": "x", "model": {"source": str(tiny_llama)}, "data": {"source": "x.csv"}}
    with pytest.raises(ConfigError, match=r"training\.class_weights belongs to tasks that classify"):
        read({**table, "task": {"kind": "causal-lm"}, "training": {"class_weights": "balanced"}})


def own_federation(weights: Any, **more: Any) -> Federation:
    rows = Vectors(torch.zeros(3, 2), torch.tensor([0, 2, 2]))
    pairs = list(zip(rows.inputs, rows.labels, strict=True))
    return Federation(
        nn.Sequential(nn.Linear(2, 3)),
        [pairs],
        test=pairs,
        lora={"r": 1, "target_modules": ["0"]},
        training={"class_weights": weights},
        **more,
    )


def test_classes_of_one_s_own_data_are_named_by_their_numbers() -> None:
    assert own_federation({"0": 1, "2": 4}).settings.training.class_weights == {"0": 1.0, "2": 4.0}
    with pytest.raises(ConfigError, match="no weight for the class '2'"):
        own_federation({"0": 1, "1": 4})


def test_an_objective_that_cannot_weigh_classes_is_refused() -> None:
    class Plain:
        loss = parts = evaluate = None

    with pytest.raises(ConfigError, match="class_weights = 'balanced': the objective Plain does not weigh"):
        own_federation("balanced", objective=Plain())
