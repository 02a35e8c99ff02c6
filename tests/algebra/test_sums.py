"""Sums of a memory and a product, against dense sums in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.algebra.alignment import truncated
from fedsmoothlora.algebra.coding import code_product, unpacked
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.spectral import dominant_triplets
from fedsmoothlora.algebra.sums import Matrix, Sum, dense, plus, remainder, unformed
from fedsmoothlora.errors import NotFiniteError


def product(m: int, n: int, rank: int, seed: int) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw))


def array(matrix: Matrix) -> np.ndarray:
    return np.asarray(dense(matrix).double().numpy())


@given(
    *[st.integers(1, 9)] * 3,
    st.integers(0, 3),
    st.sampled_from(["dense", "product", "none"]),
    st.integers(0, 2**31),
)
def test_a_sum_multiplies_as_the_dense_sum(
    m: int, n: int, width: int, rank: int, kind: str, seed: int
) -> None:
    new, old = product(m, n, rank, seed), product(m, n, 2, seed + 1)
    memory = {"dense": old.dense(), "product": old, "none": None}[kind]
    found = unformed(new, memory)
    want = array(new) + (0.0 if memory is None else array(memory))
    np.testing.assert_allclose(array(found), want, atol=1e-5)
    # No sum is left unformed if its product has more numbers than the matrix.
    assert isinstance(found, Sum) == (memory is not None and rank * (m + n) <= m * n)
    if isinstance(found, Sum):
        columns, rows = product(n, width, 1, seed).dense(), product(width, m, 1, seed).dense()
        np.testing.assert_allclose(found.times(columns).numpy(), want @ columns.double().numpy(), atol=1e-4)
        np.testing.assert_allclose(found.under(rows).numpy(), rows.double().numpy() @ want, atol=1e-4)
        sent = product(m, n, 1, seed + 2)
        for overwrites in (False, True):
            left = remainder(found, sent, overwrites=overwrites)
            np.testing.assert_allclose(array(left), want - array(sent), atol=1e-5)


def test_a_dense_memory_is_overwritten_only_if_it_may_be() -> None:
    memory, new, sent = torch.ones(30, 20), product(30, 20, 2, 0), product(30, 20, 2, 1)
    total = unformed(new, memory)
    left = remainder(total, sent)
    assert torch.equal(memory, torch.ones(30, 20))
    assert remainder(total, sent, overwrites=True) is memory
    assert torch.equal(memory, left)


@pytest.mark.parametrize("kind", ["dense", "product"])
def test_the_triplets_of_a_small_or_thin_sum_are_those_of_the_formed_one(kind: str) -> None:
    for m, n, rank in [(40, 30, 2), (300, 200, 2)]:
        old = product(m, n, 3, 1)
        total = Sum(old if kind == "product" else old.dense(), product(m, n, rank, 0))
        if kind == "dense" and min(m, n) > 96:
            continue
        formed = truncated(total.formed(), 4, feeds_back=True)
        found = truncated(total, 4, feeds_back=True)
        assert torch.equal(found.B, formed.B)
        assert torch.equal(found.A, formed.A)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("noise", [0.0, 0.3, 100.0])
def test_a_large_sum_gets_nearly_all_that_the_best_triplets_hold(
    shape: tuple[int, int], noise: float
) -> None:
    """The memory holds directions that are stronger than the new product's, and noise."""
    draw = torch.Generator().manual_seed(3)
    old = product(*shape, 4, 1)
    memory = (3.0 * old).dense() + noise * torch.randn(shape, generator=draw)
    for kept in (memory, 3.0 * product(*shape, 60, 1)):
        total = Sum(kept, product(*shape, 8, 2))
        P, sigma, Q = dominant_triplets(total, 8)
        for vectors in (P, Q):
            assert torch.allclose(vectors.mT @ vectors, torch.eye(8), atol=1e-5)
        matrix = dense(total)
        assert torch.allclose(P.mT @ matrix @ Q, torch.diag(sigma), atol=1e-3 * float(sigma[0]))
        best = torch.linalg.svdvals(matrix)[:8].square().sum()
        share = float((P.mT @ matrix).square().sum() / best)
        assert share > (0.7 if noise > 1 or kept is not memory else 0.97)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("scale", [0.0, 1e-25, 1.0, 1e15])
def test_products_without_directions_and_of_any_scale_are_allowed(rank: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    memory = scale * torch.randn(150, 120, generator=draw)
    P, sigma, Q = dominant_triplets(Sum(memory, scale * product(150, 120, rank, 0)), 4)
    assert (P.shape, sigma.shape, Q.shape) == ((150, 4), (4,), (120, 4))
    assert torch.isfinite(torch.cat([P, Q])).all()
    assert (float(sigma.max()) > 0) == (scale > 0)


def test_a_sum_that_is_not_finite_is_refused() -> None:
    memory = torch.zeros(150, 120)
    memory[3, 4] = float("nan")
    with pytest.raises(NotFiniteError, match="not finite"):
        dominant_triplets(Sum(memory, product(150, 120, 2, 0)), 4)


@pytest.mark.parametrize("bits", [8, 3])
def test_with_feedback_all_that_was_sent_and_what_is_left_are_all_products(bits: int) -> None:
    """``sum_t S^t + E = sum_t M^t`` on a layer that is large enough for the search without full SVDs."""
    m, n = 140, 110
    memory: LowRank | torch.Tensor | None = None
    wanted, got = np.zeros((m, n)), np.zeros((m, n))
    for t in range(40):
        new = product(m, n, 3, t)
        total = unformed(new, memory)
        sent = code_product(total, truncated(total, 2, feeds_back=True), bits)
        memory = remainder(total, LowRank.of(unpacked(sent)), overwrites=True)
        wanted, got = wanted + array(new), got + array(LowRank.of(unpacked(sent)))
    assert isinstance(memory, torch.Tensor)
    np.testing.assert_allclose(got + array(memory), wanted, atol=1e-5 * np.linalg.norm(wanted))
    assert np.linalg.norm(array(plus(LowRank.zeros(m, n), memory))) < 0.95 * np.linalg.norm(wanted)
