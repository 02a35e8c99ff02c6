"""Rounds in a shared subspace, against dense sums and NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedsmoothlora.algebra import subspace
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.sums import Matrix, Sum, dense, plus, remainder

SHAPES = (st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))


def draw(seed: int, *purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash((seed, *purpose)) % 2**62)


def matrices(m: int, n: int, rank: int, count: int, seed: int) -> list[LowRank]:
    generator = draw(seed)
    return [
        LowRank(
            torch.randn(m, rank, generator=generator, dtype=torch.float64),
            torch.randn(rank, n, generator=generator, dtype=torch.float64),
        )
        for _ in range(count)
    ]


def rounded(value: Tensor) -> Tensor:
    """A coarse coding of numbers, with one scale per column."""
    scale = value.abs().amax(dim=0).clamp(min=1e-30) / 3
    return (value / scale).round() * scale


@given(*SHAPES, st.sampled_from(["full", "zero", "repeated", "tiny"]))
def test_the_basis_is_orthonormal_and_contains_the_columns(
    n: int, r: int, rank: int, seed: int, kind: str
) -> None:
    r = min(r, n)
    columns = torch.randn(n, r, generator=draw(seed), dtype=torch.float64)
    if kind == "zero":
        columns[:, seed % r] = 0
    elif kind == "repeated":
        columns[:, seed % r] = 3 * columns[:, 0]
    elif kind == "tiny":
        columns[:, seed % r] *= 1e-14
    basis = subspace.orthonormal(columns, draw(seed, 1))
    torch.testing.assert_close(basis.mT @ basis, torch.eye(r, dtype=torch.float64), atol=1e-10, rtol=0)
    torch.testing.assert_close(basis @ (basis.mT @ columns), columns, atol=1e-10, rtol=1e-10)


def test_columns_without_information_are_the_seeds_and_not_noise() -> None:
    """A change of 1e-14 turns what is left of a dependent column into another direction."""
    columns = torch.randn(30, 4, generator=draw(1), dtype=torch.float64)
    columns[:, 2] = columns[:, 0] - columns[:, 1]
    moved = columns.clone()
    moved[:, 2] += 1e-14 * torch.randn(30, generator=draw(2), dtype=torch.float64)
    one, other = (subspace.orthonormal(value, draw(3)) for value in (columns, moved))
    torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
    assert not torch.allclose(one[:, 2], subspace.orthonormal(columns, draw(4))[:, 2], atol=0.1)
    assert not subspace.is_reproducible(columns)
    assert subspace.is_reproducible(columns[:, :2])
    assert not subspace.is_reproducible(torch.zeros(5, 2))


@given(*SHAPES, st.sampled_from(["product", "dense", "sum"]))
def test_both_parts_of_an_upload_agree_with_numpy(m: int, n: int, r: int, seed: int, kind: str) -> None:
    r = min(r, m, n)
    one, two = matrices(m, n, 2, 2, seed)
    matrix: Matrix = {"product": one, "dense": one.dense(), "sum": Sum(two, one)}[kind]
    M = dense(matrix).numpy()
    Q = subspace.orthonormal(torch.randn(n, r, generator=draw(seed, 1), dtype=torch.float64), draw(seed, 2))
    P = torch.randn(m, r, generator=draw(seed, 3), dtype=torch.float64)
    np.testing.assert_allclose(subspace.projected(matrix, Q).numpy(), M @ Q.numpy(), atol=1e-8)
    K = np.linalg.inv(P.T.numpy() @ P.numpy() + 1e-6 * np.eye(r))
    want = M.T @ P.numpy() @ K
    np.testing.assert_allclose(subspace.coordinates(matrix, P).numpy(), want, rtol=1e-6, atol=1e-8)


@given(*SHAPES, st.integers(0, 3), st.booleans())
def test_no_change_is_lost_over_rounds(m: int, n: int, r: int, seed: int, rank: int, rounds_P: bool) -> None:
    """The server's updates and the clients' E_c make up all changes, also if P was rounded on its way."""
    r, weights = min(r, m, n), (0.5, 0.3, 0.2)
    Q = torch.eye(n, dtype=torch.float64)[:, :r]
    merged = changed = torch.zeros(m, n, dtype=torch.float64)
    kept: list[LowRank | Tensor | None] = [None] * len(weights)
    for t in range(4):
        changes = matrices(m, n, rank, len(weights), seed + t)
        totals = [plus(change, left) for change, left in zip(changes, kept, strict=True)]
        first = sum(w * subspace.projected(total, Q) for w, total in zip(weights, totals, strict=True))
        P = subspace.orthonormal(first, draw(seed, t, 1))
        if rounds_P:
            P = rounded(P)
        parts = [subspace.coordinates(total, P) for total in totals]
        kept = [remainder(one, subspace.product(P, R)) for one, R in zip(totals, parts, strict=True)]
        S = subspace.product(P, sum(w * R for w, R in zip(weights, parts, strict=True)))
        Q = subspace.orthonormal(S.A.mT, draw(seed, t, 2))
        merged = merged + S.dense()
        changed = changed + sum(w * one.dense() for w, one in zip(weights, changes, strict=True))
        rest = sum(w * dense(one) for w, one in zip(weights, kept, strict=True) if one is not None)
        torch.testing.assert_close(merged + rest, changed, atol=1e-7, rtol=1e-7)


def test_a_round_holds_a_mean_of_the_subspaces_rank() -> None:
    """If all changes together have rank r, one round merges their mean, up to the ridge."""
    shared = torch.randn(3, 20, generator=draw(1), dtype=torch.float64)
    changes = [
        LowRank(torch.randn(12, 3, generator=draw(2, c), dtype=torch.float64), shared) for c in range(2)
    ]
    mean = 0.5 * (changes[0].dense() + changes[1].dense())
    Q = subspace.orthonormal(torch.randn(20, 3, generator=draw(3), dtype=torch.float64), draw(4))
    P = subspace.orthonormal(mean @ Q, draw(5))
    S = subspace.product(P, sum(0.5 * subspace.coordinates(one, P) for one in changes))
    torch.testing.assert_close(S.dense(), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [0, 3])
def test_an_empty_or_zero_sum_has_a_random_basis(columns: int) -> None:
    basis = subspace.orthonormal(torch.zeros(5, columns), draw(1))
    torch.testing.assert_close(basis.mT @ basis, torch.eye(columns))
