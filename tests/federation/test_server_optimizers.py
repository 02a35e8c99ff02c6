"""Federated optimisers at the server against their formulas, dense, by numpy."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from families import by_family
from fedsmoothlora import methods
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.server_optimizers import ServerOptimizer
from fedsmoothlora.federation.settings import ServerSettings
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.methods import ServerUpdate, Traits

M, N, R = 9, 7, 2
MERGES, FACTORS, PRODUCT = Traits(), Traits(step_on="factors"), Traits(step_on="product")
ADAPTIVE = ["adagrad", "adam", "yogi"]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(seed: int, rank: int = R) -> LowRank:
    return LowRank(normal(M, rank, seed=seed), normal(rank, N, seed=seed + 1000))


def optimizer(kind: str, **settings: Any) -> ServerOptimizer:
    return ServerOptimizer(settings=ServerSettings(optimizer=kind, **settings))  # type: ignore[arg-type]


def no_lora(name: str) -> LowRank:
    raise AssertionError("what is merged needs no LoRA")


def merged(own: ServerOptimizer, deltas: Sequence[LowRank | Tensor]) -> list[np.ndarray]:
    steps = []
    for delta in deltas:
        found = own.apply(ServerUpdate(merge={"w": delta}), MERGES, "product", no_lora, None).merge["w"]
        assert type(found) is type(delta)
        steps.append(found.numpy() if isinstance(found, Tensor) else (found.B @ found.A).numpy())
    return steps


def svd(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, sigma, Vt = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vt[:rank]


def momentum_by_hand(deltas: Sequence[np.ndarray], lr: float, beta: float) -> list[np.ndarray]:
    m, steps = np.zeros_like(deltas[0]), []
    for delta in deltas:
        m = beta * m + delta
        steps.append(lr * m)
    return steps


def adaptive_by_hand(
    kind: str, deltas: Sequence[np.ndarray], lr: float, beta1: float, beta2: float, tau: float
) -> list[np.ndarray]:
    """Algorithm 2 of Reddi et al. (2003.00295)."""
    m, v, steps = np.zeros_like(deltas[0]), np.full_like(deltas[0], tau**2), []
    for delta in deltas:
        m = beta1 * m + (1 - beta1) * delta
        v = {
            "adagrad": v + delta**2,
            "adam": beta2 * v + (1 - beta2) * delta**2,
            "yogi": v - (1 - beta2) * delta**2 * np.sign(v - delta**2),
        }[kind]
        steps.append(lr * m / (np.sqrt(v) + tau))
    return steps


def test_none_changes_nothing() -> None:
    update = ServerUpdate(merge={"w": product(0)}, model={"v": product(1)})
    assert ServerOptimizer().apply(update, MERGES, "product", no_lora, None) is update
    assert not ServerOptimizer().moments


@pytest.mark.parametrize("beta", [None, 0.0, 0.5])
def test_momentum_on_a_dense_update_is_fedavgm(beta: float | None) -> None:
    deltas = [normal(M, N, seed=seed) for seed in range(4)]
    want = momentum_by_hand([d.numpy() for d in deltas], 0.7, 0.9 if beta is None else beta)
    for got, wanted in zip(merged(optimizer("momentum", lr=0.7, beta1=beta), deltas), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12)


def test_momentum_on_products_is_kept_exactly_and_merged_at_the_updates_own_rank() -> None:
    deltas = [product(seed) for seed in range(6)]  # of more directions together than the layer has
    own = optimizer("momentum")
    want = momentum_by_hand([(d.B @ d.A).numpy() for d in deltas], 1.0, 0.9)
    for got, wanted in zip(merged(own, deltas), want, strict=True):
        np.testing.assert_allclose(got, svd(wanted, R), atol=1e-6)
    moment = own.moments["m w"]
    assert isinstance(moment, LowRank)
    assert moment.rank <= min(M, N)
    np.testing.assert_allclose((moment.B @ moment.A).numpy(), want[-1], atol=1e-5)


@pytest.mark.parametrize("kind", ADAPTIVE)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "product"])
def test_adaptive_optimisers_are_those_of_the_paper(kind: str, dense: bool) -> None:
    deltas: list[LowRank | Tensor] = [normal(M, N, seed=s) if dense else product(s) for s in range(4)]
    matrices = [(d if isinstance(d, Tensor) else d.B @ d.A).numpy() for d in deltas]
    own = optimizer(kind, lr=0.3, beta1=0.8, epsilon=0.05, **({} if kind == "adagrad" else {"beta2": 0.95}))
    want = adaptive_by_hand(kind, matrices, 0.3, 0.8, 0.95, 0.05)
    for got, wanted in zip(merged(own, deltas), want, strict=True):
        np.testing.assert_allclose(got, wanted if dense else svd(wanted, R), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["momentum", *ADAPTIVE])
def test_averaged_factors_step_separately_from_the_servers_own(kind: str) -> None:
    old = LowRank(normal(M, R, seed=50), normal(R, N, seed=51))
    new = LowRank(normal(M, R, seed=52), normal(R, N, seed=53))
    own = optimizer(kind)
    found = own.apply(ServerUpdate(model={"w": new}), FACTORS, "product", lambda name: old, None).model["w"]
    for part in ("B", "A"):
        before, delta = getattr(old, part).numpy(), (getattr(new, part) - getattr(old, part)).numpy()
        step = (
            momentum_by_hand([delta], 1.0, 0.9)
            if kind == "momentum"
            else adaptive_by_hand(kind, [delta], 0.1, 0.0 if kind == "adagrad" else 0.9, 0.99, 1e-3)
        )
        np.testing.assert_allclose(getattr(found, part).numpy(), before + step[0], rtol=1e-9)


@pytest.mark.parametrize("sent", ["B", "A"])
def test_only_the_trained_factor_moves_and_is_sent(sent: Any) -> None:
    own = optimizer("momentum", beta1=0.5)
    old = product(1)
    parts = {"B": old.B, "A": old.A}
    for seed in (2, 3):  # with momentum left from the first, a factor would move in the second
        parts[sent] = parts[sent] + normal(*parts[sent].shape, seed=seed)
        update = ServerUpdate(model={"w": LowRank(parts["B"], parts["A"])}, lora={"w": parts[sent]})
        found = own.apply(update, FACTORS, sent, lambda name: old, None)
        assert found.lora is not None
        assert torch.equal(found.lora["w"], getattr(found.model["w"], sent))
        other = "A" if sent == "B" else "B"
        assert torch.equal(getattr(found.model["w"], other), getattr(old, other))


def test_factors_shared_without_a_global_model_step_from_the_last_sent_factors() -> None:
    own, initial = optimizer("momentum"), product(0)
    values = [normal(R, N, seed=seed) for seed in range(3)]
    last: dict[str, Tensor] | None = None
    want, m = initial.A.numpy(), np.zeros((R, N))
    for value in values:
        update = own.apply(ServerUpdate(lora={"w": value}), FACTORS, "A", lambda name: initial, last)
        m = 0.9 * m + (value.numpy() - want)
        want = want + m
        assert update.lora is not None
        np.testing.assert_allclose(update.lora["w"].numpy(), want, rtol=1e-10)
        last = dict(update.lora)  # type: ignore[arg-type]


def test_an_averaged_product_steps_from_the_servers_own_and_keeps_its_rank() -> None:
    own, old = optimizer("momentum", lr=0.5), product(0)
    new = product(1)
    found = own.apply(ServerUpdate(model={"w": new}), PRODUCT, "product", lambda name: old, None).model["w"]
    before, after = (old.B @ old.A).numpy(), (new.B @ new.A).numpy()
    want = svd(before + svd(0.5 * (after - before), R), R)
    np.testing.assert_allclose((found.B @ found.A).numpy(), want, atol=1e-10)


def test_the_head_steps_too() -> None:
    own = optimizer("momentum", beta1=0.5)
    head = {"bias": torch.zeros(3, dtype=torch.float64)}
    means = [normal(3, seed=seed) for seed in range(3)]
    want, m = np.zeros(3), np.zeros(3)
    for mean in means:
        head = own.head({"bias": mean}, head)
        m = 0.5 * m + (mean.numpy() - want)
        want = want + m
        np.testing.assert_allclose(head["bias"].numpy(), want, rtol=1e-12)


STEPPING = [name for name in methods.names() if methods.find(name).traits.step_on]


@pytest.mark.parametrize("kind", ["momentum", "adam"])
@pytest.mark.parametrize("method", by_family(STEPPING))
def test_every_method_with_an_update_learns_with_an_optimiser(
    toy_federation: Callable[..., Simulation], method: str, kind: str
) -> None:
    federation = toy_federation(
        {
            "method.name": method,
            "training.rounds": 4,
            "server.optimizer": kind,
            "server.beta1": 0.5,
            **({"server.lr": 0.01} if kind == "adam" else {}),
        }
    )
    records = list(run_rounds(federation, Callback()))
    assert (records[-1].value("loss") or 99) < (records[0].value("loss") or 0)
    assert federation.server.optimizer.moments
    # What clients are told was merged is what was merged.
    backbone = federation.learner.model.backbone
    for name in federation.server.layers:
        parts = [u[name] for u in federation.server.updates if name in u]
        if not parts:
            continue
        total = sum(p.dense() if isinstance(p, LowRank) else p for p in parts)
        got = backbone.merged(name)
        dense = got.dense() if isinstance(got, LowRank) else got
        torch.testing.assert_close(dense, total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"method.name": "fedex", "server.optimizer": "adam"}, ("fedex", "averaging the factors")),
        ({"method.name": "fedmomentum", "server.optimizer": "adam"}, ("fedmomentum", "momentum")),
        ({"method.name": "local", "server.optimizer": "momentum"}, ("local", "averages nothing")),
        ({"server.lr": 0.5}, ("server.lr", "momentum")),
        ({"server.optimizer": "momentum", "server.beta2": 0.9}, ("server.beta2", "adam")),
        ({"server.optimizer": "momentum", "server.epsilon": 0.9}, ("server.epsilon", "adagrad")),
        ({"server.optimizer": "adagrad", "server.beta2": 0.9}, ("server.beta2", "yogi")),
        ({"server.optimizer": "adam", "method.server_feedback": True}, ("server_feedback",)),
        ({"server.optimizer": "sgd"}, ("server.optimizer", "momentum")),
    ],
)
def test_incompatible_settings_are_refused_with_the_reason(
    toy_table: dict[str, Any], overrides: dict[str, Any], words: Sequence[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        read(toy_table, overrides)
    for word in words:
        assert word in str(error.value)
