"""Diagnostic metrics against dense matrices in NumPy."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedsmoothlora.algebra.alignment import gradient_aligned
from fedsmoothlora.algebra.diagnostics import effective_rank, gradient_cosine, norm_and_cosine, spread
from fedsmoothlora.algebra.lowrank import LowRank, with_core
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation

Make = Callable[..., Simulation]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(m: int, n: int, rank: int, seed: int) -> LowRank:
    return LowRank(normal(m, rank, seed=seed), normal(rank, n, seed=seed + 500))


def dense(value: LowRank | Tensor) -> np.ndarray:
    return value.numpy() if isinstance(value, Tensor) else value.B.numpy() @ value.A.numpy()


@pytest.mark.parametrize("trains", [("B", "A"), ("B",), ("A",)])
def test_the_gradient_cosine_matches_a_small_gradient_step(trains: tuple[Any, ...]) -> None:
    G, lora = {"w": normal(9, 7, seed=1)}, {"w": product(9, 7, 2, seed=2)}
    lr, moved = 1e-7, {}
    for part in ("B", "A"):
        factor = getattr(lora["w"], part).clone().requires_grad_()
        other = {"B": lora["w"].B, "A": lora["w"].A} | {part: factor}
        (gradient,) = torch.autograd.grad(((other["B"] @ other["A"]) * G["w"]).sum(), factor)
        moved[part] = factor.detach() - (lr * gradient if part in trains else 0)
    step = dense(lora["w"]) - dense(LowRank(moved["B"], moved["A"]))
    want = (step * G["w"].numpy()).sum() / np.linalg.norm(step) / np.linalg.norm(G["w"].numpy())
    assert gradient_cosine(G, lora, trains) == pytest.approx(want, rel=1e-5)


def test_a_gradient_aligned_start_follows_its_2r_leading_directions() -> None:
    G = normal(30, 20, seed=3)
    sigma = np.linalg.svd(G.numpy(), compute_uv=False)
    want = math.sqrt((sigma[:6] ** 2).sum()) / np.linalg.norm(sigma)
    assert gradient_cosine({"w": G}, {"w": gradient_aligned(G, 3, 16.0)}) == pytest.approx(want, rel=1e-6)


def test_the_cosine_is_undefined_without_gradient_or_step() -> None:
    lora = {"w": product(4, 3, 1, seed=0)}
    assert gradient_cosine({"w": torch.zeros(4, 3, dtype=torch.float64)}, lora) is None
    nothing = {"w": LowRank.zeros(4, 3, dtype=torch.float64)}
    assert gradient_cosine({"w": normal(4, 3, seed=1)}, nothing) is None


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(0, 4), st.integers(0, 10_000))
def test_spread_is_the_root_mean_square_distance_from_the_mean(clients: int, rank: int, seed: int) -> None:
    scales = {"a": 2.0, "b": 0.5}
    shapes = {"a": (40, 30), "b": (4, 5)}
    starts = [
        {name: product(*shape, rank, seed=seed + 7 * c) for name, shape in shapes.items()}
        for c in range(clients)
    ]
    total = 0.0
    for name, scale in scales.items():
        stacked = np.stack([scale * dense(start[name]) for start in starts])
        total += ((stacked - stacked.mean(axis=0)) ** 2).sum() / clients
    assert spread(starts, scales) == pytest.approx(math.sqrt(total), rel=1e-6, abs=1e-6)


def test_equal_starts_have_no_spread() -> None:
    start = {"w": product(40, 30, 2, seed=1)}
    assert spread([start] * 4, {"w": 3.0}) == pytest.approx(0.0, abs=1e-6)
    assert spread([], {"w": 3.0}) == 0.0


@pytest.mark.parametrize("kinds", ["pp", "pd", "dp", "dd"])
def test_norm_and_cosine_of_changes_match_dense_matrices(kinds: str) -> None:
    scales = {"a": 2.0, "b": 0.5}
    changes: list[dict[str, LowRank | Tensor]] = []
    for i, kind in enumerate(kinds):
        changes.append(
            {
                name: product(6, 5, 2, seed=i + k) if kind == "p" else normal(6, 5, seed=i + k)
                for k, name in enumerate(scales)
            }
        )
    now, before = (np.concatenate([s * dense(c[n]).ravel() for n, s in scales.items()]) for c in changes)
    norm, cosine = norm_and_cosine(changes[0], changes[1], scales)
    assert norm == pytest.approx(np.linalg.norm(now))
    assert cosine == pytest.approx(now @ before / np.linalg.norm(now) / np.linalg.norm(before))


def test_the_first_change_has_no_cosine() -> None:
    assert norm_and_cosine({"w": product(3, 4, 1, seed=0)}, {}, {"w": 1.0})[1] is None


@pytest.mark.parametrize("as_product", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_effective_rank_of_equal_singular_values_is_their_number(rank: int, as_product: bool) -> None:
    P, Q = torch.linalg.qr(normal(9, rank, seed=1)).Q, torch.linalg.qr(normal(6, rank, seed=2)).Q
    value = LowRank(P * 3, Q.mT.contiguous())
    assert effective_rank(value if as_product else value.dense()) == pytest.approx(rank)


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    matrix = normal(8, 5, seed=4)
    p = np.linalg.svd(matrix.numpy(), compute_uv=False)
    p = p / p.sum()
    assert effective_rank(matrix) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert effective_rank(LowRank(torch.eye(8, dtype=torch.float64), normal(8, 5, seed=4))) == pytest.approx(
        effective_rank(matrix)
    )
    assert effective_rank(torch.zeros(3, 2)) == 0.0


def test_effective_rank_of_bfloat16_factors() -> None:
    sent = product(9, 6, 2, seed=5).to(dtype=torch.bfloat16)
    assert effective_rank(sent) == pytest.approx(effective_rank(sent.to(dtype=torch.float32)))


# -- in a federation --------------------------------------------------------------------------------------


def metrics(records: list[RoundRecord], name: str) -> dict[tuple[int, str | None], float]:
    return {(r.round, f.client): f.value for r in records for f in r.metrics if f.name == name}


@pytest.mark.parametrize(
    "method", ["fedsmoothlora", "fedit", "flora", "ffa", "fedmomentum", "frlora", "ravan", "full"]
)
def test_diagnostics_add_metrics_and_change_no_result(toy_federation: Make, method: str) -> None:
    plain = toy_federation({"method.name": method})
    diagnosed = toy_federation({"method.name": method, "evaluation.diagnostics": True})
    without, records = list(run_rounds(plain, Callback())), list(run_rounds(diagnosed, Callback()))
    known = {f.name for record in without for f in record.metrics}
    added = {f.name for record in records for f in record.metrics} - known
    start = set() if method == "full" else {"start_gradient_cosine"}
    start |= {"loss_at_start", "loss_at_end", "seconds_diagnosis", "start_distance"}
    assert added == start | {"update_norm", "update_cosine", "merged_effective_rank"}
    for one, other in zip(without, records, strict=True):
        for f in one.metrics:
            if not f.name.startswith("seconds"):
                assert f in other.metrics
    assert len(metrics(records, "update_cosine")) == 2  # of three updates


def test_the_update_norm_is_the_distance_of_the_global_weights(toy_federation: Make) -> None:
    for method in ("fedsmoothlora", "fedit", "fedex", "full"):
        federation = toy_federation({"method.name": method, "evaluation.diagnostics": True})
        backbone, server = federation.learner.model.backbone, federation.server
        before: dict[str, Tensor] = {name: backbone.pretrained(name).clone() for name in server.layers}
        steps: list[Tensor] = []
        for record in run_rounds(federation, Callback()):
            now = {name: backbone.weight(name, server.model.get(name)) for name in server.layers}
            step = torch.cat([(now[name] - before[name]).flatten() for name in now])
            if record.round:
                assert record.value("update_norm") == pytest.approx(float(step.norm()), rel=1e-3)
            if record.round > 1:
                cosine = float(step @ steps[-1] / step.norm() / steps[-1].norm())
                assert record.value("update_cosine") == pytest.approx(cosine, abs=2e-3)
            steps.append(step)
            before = now


def test_the_loss_at_the_end_of_a_round_equals_the_loss_at_the_next_start(toy_federation: Make) -> None:
    """A single client whose directions all fit continues where it ended, and so does its loss."""
    records = list(
        run_rounds(
            toy_federation(
                {
                    "method.name": "fedit",
                    "partition.kind": "iid",
                    "partition.clients": 1,
                    "evaluation.diagnostics": True,
                }
            ),
            Callback(),
        )
    )
    start, end = metrics(records, "loss_at_start"), metrics(records, "loss_at_end")
    (client,) = {client for _, client in start}
    for round in (1, 2):
        assert start[round + 1, client] == pytest.approx(end[round, client], rel=1e-4)
    assert end[1, client] < start[1, client]


def test_the_start_distance_is_zero_only_if_all_clients_start_alike(toy_federation: Make) -> None:
    def distance(**overrides: Any) -> list[float]:
        federation = toy_federation({"evaluation.diagnostics": True, **overrides})
        return list(metrics(list(run_rounds(federation, Callback())), "start_distance").values())

    assert distance(**{"method.name": "fedit"}) == pytest.approx([0, 0, 0], abs=1e-5)
    own = distance()
    assert own[0] == pytest.approx(0, abs=1e-5)  # the effective weights of round 0 are the pretrained ones
    assert min(own[1:]) > 1e-3


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_gradient_cosine_of_a_matrix_between_factors_is_that_of_a_small_step(size: int) -> None:
    G, product_ = normal(7, 9, seed=1), product(7, 9, 4, seed=2)
    R = normal(4, size, seed=3).requires_grad_()
    dense = product_.B @ with_core(R, product_.A)
    (slope,) = torch.autograd.grad((G * dense).sum(), R)
    step = product_.B @ with_core(slope, product_.A)
    want = float((G * step).sum() / (G.norm() * step.norm()))
    found = gradient_cosine({"w": G}, {"w": product_}, ("R",), {"w": R.detach()})
    assert found == pytest.approx(want)
