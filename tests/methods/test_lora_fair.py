"""LoRA-FAIR against its formula: the ridge solution for B, in dense float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracles import (
    COUNTS,
    LAYERS,
    RANK,
    aggregate,
    client_view,
    close,
    dense,
    mean,
    mean_of_products,
    method,
    products,
    server_view,
    three,
)

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.runs.planning import plan


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("regularization", [1e-6, 0.01, 1.0, 1e6])
def test_the_corrected_B_is_the_ridge_solution(seed: int, regularization: float) -> None:
    """The minimum over ``dB`` of ``||DW - (B + dB) A||^2 + lambda ||dB||^2``, by stacked least squares."""
    uploads = three(seed)
    update = method("lora_fair", regularization=regularization).aggregate(uploads, COUNTS, server_view())
    assert not update.merge
    for name in LAYERS:
        B, A = (mean([getattr(u[name], part).numpy() for u in uploads]) for part in "BA")
        stacked = np.vstack([A.T, np.sqrt(regularization) * np.eye(RANK)])
        left = np.vstack([(mean_of_products(uploads, name) - B @ A).T, np.zeros((RANK, LAYERS[name].m))])
        dB = np.linalg.lstsq(stacked, left, rcond=None)[0].T
        close(update.model[name].B.numpy(), B + dB)
        close(update.model[name].A.numpy(), A)


@pytest.mark.parametrize("seed", range(3))
def test_the_product_is_closer_to_the_mean_of_products_than_that_of_fedit(seed: int) -> None:
    uploads = three(seed)
    for name in LAYERS:
        want = mean_of_products(uploads, name)
        own, plain = (
            np.linalg.norm(want - dense(aggregate(of, uploads).model[name])) for of in ("lora_fair", "fedit")
        )
        assert own < plain


def test_with_little_regularization_the_product_is_the_projection_onto_the_rows_of_A() -> None:
    uploads = three(4)
    update = method("lora_fair", regularization=1e-12).aggregate(uploads, COUNTS, server_view())
    for name in LAYERS:
        rows = np.linalg.svd(update.model[name].A.numpy(), full_matrices=False)[2]
        np.testing.assert_allclose(
            dense(update.model[name]), mean_of_products(uploads, name) @ rows.T @ rows, atol=1e-8
        )


def test_one_client_or_a_common_A_need_no_correction() -> None:
    alone = three(2)[:1]
    for name, product in aggregate("lora_fair", alone).model.items():
        assert torch.equal(product.B, alone[0][name].B)
    shared = [{n: type(u[n])(u[n].B, products(9)[n].A) for n in LAYERS} for u in three(3)]
    for name, product in aggregate("lora_fair", shared).model.items():
        close(dense(product), mean_of_products(shared, name))


def test_a_mean_A_of_lower_rank_is_no_error() -> None:
    uploads = three(1)
    for upload in uploads:
        for product in upload.values():
            product.A[1] = product.A[0]
    for name, product in aggregate("lora_fair", uploads).model.items():
        assert product.is_finite()
        assert np.linalg.norm(dense(product) - mean_of_products(uploads, name)) < 1e3


def test_clients_continue_from_the_corrected_factors() -> None:
    lora_fair, update = method("lora_fair"), aggregate("lora_fair", three(5))
    start = lora_fair.start(client_view(1, server_lora=update.model))
    assert set(start.trains) == {"B", "A"}
    assert all(start.lora[name] is update.model[name] for name in LAYERS)


def test_scaffold_corrects_both_factors(toy_federation: Callable[..., Simulation]) -> None:
    federation = toy_federation(
        {
            "method.name": "lora_fair",
            "training.scaffold": True,
            "training.momentum": 0.0,
            "training.max_grad_norm": None,
        }
    )
    records = list(run_rounds(federation, Callback()))
    assert all(record.value("refused") == 0 for record in records[1:])
    control = federation.server.control or {}
    for name in federation.server.layers:
        assert all(control[f"{name}.lora_{part}"].any() for part in "BA")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"server.optimizer": "adam"}, "would change A after the fit"),
        ({"server.aggregation": "median"}, "needs every client's product"),
        ({"lora.client_ranks": "halving"}, "must all have one"),
        ({"method.regularization": 0.0}, r"method\.regularization"),
    ],
    ids=["server optimiser", "median", "ranks", "no regularization"],
)
def test_settings_that_do_not_fit_are_refused_with_the_reason(
    toy_table: dict[str, Any], overrides: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan(read(toy_table, {"method.name": "lora_fair", **overrides}))
