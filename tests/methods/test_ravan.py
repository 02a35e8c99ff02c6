"""RAVAN against its formula: heads of fixed factors, and an exact mean of what the gains scale."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lone_client import ROUNDS, lone, recorded, trained_by_hand
from oracles import COUNTS, client_view, close, dense, mean, method, normal, of_rank, pretrained, server_view
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank, with_core
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.runs.planning import plan

Make = Callable[..., Simulation]
LAYERS = of_rank(4)
STATE = InitialState(LAYERS, 3, pretrained)
HEADS, D = 2, 2


def fixed(name: str) -> LowRank:
    return STATE.orthonormal(name).to(dtype=torch.float64)


def by_heads(name: str, blocks: Tensor) -> np.ndarray:
    """``sum_i B_i H_i A_i``, one head at a time."""
    B, A, H = (value.numpy() for value in (fixed(name).B, fixed(name).A, blocks))
    parts = [slice(D * i, D * (i + 1)) for i in range(HEADS)]
    return np.sum([B[:, part] @ H[part] @ A[part] for part in parts], axis=0)


@pytest.mark.parametrize("seed", range(3))
def test_the_global_product_is_exactly_the_mean_of_products(seed: int) -> None:
    ravan = method("ravan", heads=HEADS)
    trained = [{n: normal(4, D, seed=seed + 10 * c + i) for i, n in enumerate(LAYERS)} for c in range(3)]
    view = client_view(0, layers=LAYERS, orthonormal=fixed)
    start = ravan.start(view)
    assert tuple(start.trains) == ("R",)
    assert not any(core.any() for core in start.cores.values())  # H = 0
    sent = [ravan.upload(one, start, view).sent for one in trained]
    update = ravan.aggregate(sent, COUNTS, server_view(0, layers=LAYERS, orthonormal=fixed))
    assert not update.merge
    for name in LAYERS:
        want = mean([by_heads(name, one[name]) for one in trained])
        close(dense(update.model[name]), want)
        for given in (update.lora, ravan.whole(update)):  # of the last round's clients, and of all others
            later = ravan.start(client_view(1, layers=LAYERS, orthonormal=fixed, server_lora=given))
            product = LowRank(later.lora[name].B, with_core(later.cores[name], later.lora[name].A))
            close(dense(product), want)


def test_the_factors_are_orthonormal_and_the_same_for_all_of_one_seed() -> None:
    other = InitialState(LAYERS, 4, pretrained)
    for name in LAYERS:
        factors = STATE.orthonormal(name)
        for columns in (factors.B, factors.A.mT):
            torch.testing.assert_close(columns.mT @ columns, torch.eye(4))
        assert torch.equal(factors.B, STATE.orthonormal(name).B)
        assert not torch.equal(factors.B, other.orthonormal(name).B)


def test_a_lone_client_trains_heads_and_gains_as_by_hand(toy_federation: Make) -> None:
    federation = lone(toy_federation, {"method.name": "ravan", "lora.r": 4})
    batches = recorded(federation)
    for _ in run_rounds(federation, Callback()):
        pass
    layers, state = federation.server.layers, federation.learner.initial_state
    factors = {name: state.orthonormal(name) for name in layers}
    H = {name: torch.zeros(HEADS, D, D, requires_grad=True) for name in layers}
    g = {name: torch.ones(HEADS, requires_grad=True) for name in layers}

    def product(name: str) -> Tensor:
        B, A = factors[name].B, factors[name].A
        return B @ torch.block_diag(*(g[name][:, None, None] * H[name])) @ A

    @torch.no_grad()
    def after_round() -> None:
        for name in layers:
            H[name] *= g[name][:, None, None]
            g[name].fill_(1.0)

    trained_by_hand(
        federation, batches, range(ROUNDS), product, lambda: [*H.values(), *g.values()], after_round
    )


def test_the_gains_are_trained(toy_federation: Make) -> None:
    model = toy_federation({"method.name": "ravan"}).learner.model
    layers = model.layers
    lora = {n: LowRank(torch.randn(x.m, x.rank), torch.randn(x.rank, x.n)) for n, x in layers.items()}
    model.load_lora(lora, {name: torch.ones(2, 1) for name in layers})
    model.train_only(("R",))
    trained = {name for name in model.trained_parameters() if ".lora_" in name}
    assert trained == {f"{name}.lora_{part}" for name in layers for part in ("R", "gains")}
    model.load_lora(lora)  # without a matrix, it is the identity
    for name, found in model.lora().items():
        torch.testing.assert_close(found.dense(), lora[name].dense())


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"transport.bits": 16}, "fewer bits of them save little"),
        ({"server.optimizer": "adam"}, "matrices between fixed factors"),
        ({"training.scaffold": True}, "does not work with method 'ravan'"),
        ({"lora.client_ranks": "halving"}, "must all have one"),
        ({"lora.r": 3}, r"method\.heads = 2: layer .* has rank 3"),
        ({"method.heads": 1}, r"method\.heads"),
    ],
    ids=["16 bits", "server optimiser", "SCAFFOLD", "ranks", "heads", "one head"],
)
def test_settings_that_do_not_fit_are_refused_with_the_reason(
    toy_table: dict[str, Any], overrides: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        plan(read(toy_table, {"method.name": "ravan", **overrides}))
