"""`LowRank` against dense float64 linear algebra in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedsmoothlora.algebra.lowrank import LowRank

MODERATE = settings(max_examples=60, deadline=None)
SIZES = st.integers(1, 12)
RANKS = st.integers(0, 14)  # q >= min(m, n) included
SEEDS = st.integers(0, 2**31)
BALANCES = st.sampled_from(["sqrt", "left"])
KINDS = ("random", "zero", "repeated", "deficient", "decaying")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(m: int, n: int, r: int, seed: int, kind: str = "random", dtype=torch.float64) -> LowRank:
    """A product of rank at most ``r``; ``kind`` says what is special about its singular values."""
    draw = generator(seed)
    B = torch.randn(m, r, generator=draw, dtype=torch.float64)
    A = torch.randn(r, n, generator=draw, dtype=torch.float64)
    if kind == "zero":
        B = torch.zeros_like(B)
    elif kind == "repeated" and r:  # min(m, n, r) singular values, all 3
        k = min(m, n, r)
        B, A = torch.zeros_like(B), torch.zeros_like(A)
        B[:, :k] = 3 * torch.linalg.qr(torch.randn(m, k, generator=draw, dtype=torch.float64))[0]
        A[:k] = torch.linalg.qr(torch.randn(n, k, generator=draw, dtype=torch.float64))[0].mT
    elif kind == "deficient" and r:
        B[:] = B[:, :1]
    elif kind == "decaying":
        B = B * torch.logspace(0, -6, r, dtype=torch.float64)
    return LowRank(B.to(dtype), A.to(dtype))


PRODUCTS = st.builds(make, SIZES, SIZES, RANKS, SEEDS, st.sampled_from(KINDS))


@st.composite
def pairs(draw, dtype=torch.float64) -> tuple[LowRank, LowRank]:
    m, n = draw(SIZES), draw(SIZES)
    kinds = st.sampled_from(KINDS)
    return (
        make(m, n, draw(RANKS), draw(SEEDS), draw(kinds), dtype),
        make(m, n, draw(RANKS), draw(SEEDS), draw(kinds), dtype),
    )


def dense(product: LowRank) -> np.ndarray:
    """The product in numpy float64, by no method of the class."""
    return product.B.to(torch.float64).numpy() @ product.A.to(torch.float64).numpy()


def size(product: LowRank) -> float:
    """A scale for rounding: ``||B|| ||A||``, and never 0."""
    B, A = product.B.to(torch.float64).numpy(), product.A.to(torch.float64).numpy()
    return float(np.linalg.norm(B) * np.linalg.norm(A)) + 1e-300


def assert_same(got: np.ndarray, want: np.ndarray, scale: float, relative: float = 1e-12) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0.0) <= relative * scale


# -- construction ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "a"), [((3,), (1, 4)), ((3, 2), (1, 4)), ((3, 1), (4,)), ((2, 3, 1), (1, 4)), ((3, 0), (1, 4))]
)
def test_factors_that_do_not_fit_are_refused_with_their_shapes(b, a):
    with pytest.raises(ValueError, match=r"B \(m, r\)") as error:
        LowRank(torch.zeros(b), torch.zeros(a))
    assert str(b) in str(error.value)
    assert str(a) in str(error.value)


def test_factors_of_different_dtypes_are_refused():
    with pytest.raises(ValueError, match="one dtype"):
        LowRank(torch.zeros(3, 1), torch.zeros(1, 4, dtype=torch.float64))


def test_factors_on_different_devices_are_refused():
    with pytest.raises(ValueError, match="one device"):
        LowRank(torch.zeros(3, 1), torch.zeros(1, 4, device="meta"))


@given(SIZES, SIZES, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
@settings(max_examples=20, deadline=None)
def test_zeros_is_the_zero_matrix_of_rank_0(m, n, dtype):
    zero = LowRank.zeros(m, n, dtype=dtype)
    assert (zero.shape, zero.rank, zero.dtype, zero.nbytes) == ((m, n), 0, dtype, 0)
    assert zero.device == torch.device("cpu")
    assert torch.equal(zero.dense().to(torch.float64), torch.zeros(m, n, dtype=torch.float64))
    assert zero.norm() == 0.0
    assert zero.is_finite()


@given(SIZES, SIZES, RANKS, st.sampled_from([(torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 2)]))
@MODERATE
def test_properties_describe_the_factors(m, n, r, dtype_and_bytes):
    dtype, width = dtype_and_bytes
    product = make(m, n, r, 0, dtype=dtype)
    assert product.shape == (m, n)
    assert product.rank == r
    assert product.dtype == dtype
    assert product.device.type == "cpu"
    assert product.nbytes == r * (m + n) * width


def test_a_product_cannot_be_changed():
    with pytest.raises((AttributeError, TypeError)):
        LowRank.zeros(2, 2).B = torch.ones(2, 0)  # type: ignore[misc]


# -- algebra ---------------------------------------------------------------------------------------


@given(PRODUCTS)
@MODERATE
def test_dense_is_the_product_of_the_factors(product):
    assert_same(product.dense().numpy(), dense(product), size(product))


@given(pairs(), st.floats(-1e3, 1e3))
@MODERATE
def test_sums_differences_and_multiples_are_those_of_the_dense_matrices(both, scale):
    x, y = both
    total = size(x) + size(y)
    assert_same(dense(x + y), dense(x) + dense(y), total)
    assert_same(dense(x - y), dense(x) - dense(y), total)
    assert_same(dense(-x), -dense(x), total)
    assert_same(dense(x * scale), scale * dense(x), total * (abs(scale) + 1e-300))
    assert_same(dense(scale * x), scale * dense(x), total * (abs(scale) + 1e-300))


@given(pairs())
@MODERATE
def test_sums_keep_every_rank_and_leave_their_terms_alone(both):
    x, y = both
    before = [t.clone() for t in (x.B, x.A, y.B, y.A)]
    assert (x + y).rank == (x - y).rank == x.rank + y.rank
    assert (-x).rank == (2 * x).rank == x.rank
    assert all(torch.equal(a, b) for a, b in zip(before, (x.B, x.A, y.B, y.A), strict=True))


@given(SIZES, SIZES, st.lists(st.tuples(RANKS, SEEDS, st.floats(-10, 10)), min_size=1, max_size=6))
@MODERATE
def test_a_weighted_sum_is_that_of_the_dense_matrices(m, n, terms):
    products = [make(m, n, rank, seed) for rank, seed, _ in terms]
    weights = [weight for *_, weight in terms]
    want = sum(w * dense(p) for p, w in zip(products, weights, strict=True))
    total = LowRank.weighted_sum(products, iter(weights))
    assert total.rank == sum(rank for rank, *_ in terms)
    assert_same(dense(total), want, 10 * sum(size(p) for p in products))


def test_a_sum_of_one_product_is_weighted():
    x = make(4, 3, 2, 0)
    for weight in (1.0, 0.0, -1.0, 0.25):
        assert_same(dense(LowRank.weighted_sum([x], [weight])), weight * dense(x), size(x))


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 2.0, 3.0]])
def test_a_weighted_sum_needs_one_weight_per_product(weights):
    with pytest.raises(ValueError, match="as many weights as products"):
        LowRank.weighted_sum([make(2, 3, 1, 0), make(2, 3, 1, 1)], weights)


def test_a_weighted_sum_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        LowRank.weighted_sum([], [])


def test_products_of_different_shapes_do_not_add_or_multiply():
    x, y = make(2, 3, 1, 0), make(3, 2, 1, 1)
    for combine in (lambda: x + y, lambda: x - y, lambda: x.inner(y)):
        with pytest.raises(ValueError, match="different shapes") as error:
            combine()
        assert "(2, 3)" in str(error.value)
        assert "(3, 2)" in str(error.value)


@given(pairs())
@MODERATE
def test_norm_and_inner_product_are_those_of_the_dense_matrices(both):
    x, y = both
    assert x.norm() == pytest.approx(np.linalg.norm(dense(x)), rel=1e-12, abs=1e-12 * size(x))
    want = float((dense(x) * dense(y)).sum())
    assert x.inner(y) == pytest.approx(want, rel=1e-12, abs=1e-12 * size(x) * size(y))
    assert x.inner(y) == pytest.approx(y.inner(x), rel=1e-12, abs=1e-12 * size(x) * size(y))


@pytest.mark.parametrize(
    ("dtype", "step", "digits"), [(torch.float32, 1e-4, 3e-2), (torch.float64, 1e-10, 1e-4)]
)
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (6, 7)])
def test_the_norm_of_a_difference_of_near_equals_keeps_its_digits(shape, dtype, step, digits):
    x, direction = make(*shape, 4, 0), make(*shape, 4, 1)
    x = x.to(dtype=dtype)
    near = LowRank(x.B, (x.A.double() + step * direction.A).to(dtype))
    want = np.linalg.norm(dense(near) - dense(x))  # of the rounded factors, in float64
    assert want < 2 * step * np.linalg.norm(dense(x))
    assert (near - x).norm() == pytest.approx(want, rel=digits)


# -- truncation ------------------------------------------------------------------------------------


@given(PRODUCTS, st.integers(0, 15), BALANCES)
@settings(max_examples=120, deadline=None)
def test_truncation_loses_exactly_the_tail_of_the_singular_values(product, rank, balance):
    want = dense(product)
    sigma = np.linalg.svd(want, compute_uv=False)
    truncated = product.truncate(rank, balance)
    assert truncated.shape == product.shape
    assert truncated.rank == min(rank, product.rank, *product.shape)
    error = np.linalg.norm(dense(truncated) - want)
    tail = float(np.sqrt((sigma[rank:] ** 2).sum()))
    assert error == pytest.approx(tail, rel=1e-9, abs=1e-12 * size(product))
    kept = np.linalg.svd(dense(truncated), compute_uv=False)
    assert np.abs(kept[:rank] - sigma[:rank]).max(initial=0.0) <= 1e-12 * size(product)


@given(PRODUCTS, st.integers(0, 12), BALANCES)
@MODERATE
def test_truncation_is_the_best_approximation_where_there_is_a_gap(product, rank, balance):
    want = dense(product)
    P, sigma, Qt = np.linalg.svd(want, full_matrices=False)
    after = sigma[rank] if rank < len(sigma) else 0.0
    assume(rank == 0 or rank > len(sigma) or sigma[rank - 1] - after > 1e-3 * size(product))
    best = (P[:, :rank] * sigma[:rank]) @ Qt[:rank]
    assert_same(dense(product.truncate(rank, balance)), best, size(product), 1e-9)


@given(PRODUCTS, BALANCES)
@MODERATE
def test_rank_none_keeps_the_product(product, balance):
    kept = product.truncate(None, balance)
    assert kept.rank == min(product.rank, *product.shape)
    assert_same(dense(kept), dense(product), size(product))


@given(PRODUCTS, st.none() | st.integers(0, 12))
@MODERATE
def test_both_balances_give_the_same_product(product, rank):
    sqrt, left = product.truncate(rank, "sqrt"), product.truncate(rank, "left")
    assert sqrt.rank == left.rank
    assert_same(dense(sqrt), dense(left), size(product))


@given(PRODUCTS, st.none() | st.integers(0, 12))
@MODERATE
def test_balanced_factors_share_one_gram_matrix_of_singular_values(product, rank):
    factors = product.truncate(rank, "sqrt")
    B, A = factors.B.numpy(), factors.A.numpy()
    sigma = np.linalg.svd(dense(product), compute_uv=False)[: factors.rank]
    assert_same(B.T @ B, A @ A.T, size(product))
    assert_same(B.T @ B, np.diag(sigma), size(product))


@given(PRODUCTS, st.none() | st.integers(0, 12))
@MODERATE
def test_left_heavy_factors_have_orthonormal_rows_on_the_right(product, rank):
    factors = product.truncate(rank, "left")
    B, A = factors.B.numpy(), factors.A.numpy()
    sigma = np.linalg.svd(dense(product), compute_uv=False)[: factors.rank]
    assert_same(A @ A.T, np.eye(factors.rank), 1.0, 1e-11)
    assert_same(B.T @ B, np.diag(sigma**2), size(product) ** 2)


@given(SIZES, SIZES, st.lists(RANKS, min_size=1, max_size=4), st.integers(0, 5), BALANCES, SEEDS)
@MODERATE
def test_a_truncated_sum_is_the_svd_of_the_dense_sum_and_leaves_its_arguments(
    m, n, ranks, rank, balance, seed
):
    products = [make(m, n, r, seed + i) for i, r in enumerate(ranks)]
    weights = [1.0, -0.5, 2.0, 0.25][: len(ranks)]
    before = [(product.B.clone(), product.A.clone()) for product in products]
    total = sum(w * (p.B.numpy() @ p.A.numpy()) for w, p in zip(weights, products, strict=True))
    sigma = np.linalg.svd(total, compute_uv=False)
    found = LowRank.truncated_sum(products, weights, rank, balance)
    error = np.linalg.norm(found.dense().numpy() - total)
    assert abs(error - np.linalg.norm(sigma[rank:])) <= 1e-9 * (1 + sigma[0])
    for product, (B, A) in zip(products, before, strict=True):
        assert torch.equal(product.B, B)
        assert torch.equal(product.A, A)


@pytest.mark.parametrize("size", [5, 40])
def test_the_error_of_a_truncated_sum_is_the_squared_norm_of_what_it_drops(size):
    products = [make(size, size + 3, 4, 0), make(size, size + 3, 3, 4)]
    found, error = LowRank.truncated_sum_with_error(products, [1.0, -2.0], 3)
    dropped = dense(products[0]) - 2 * dense(products[1]) - dense(found)
    assert error == pytest.approx(float(np.linalg.norm(dropped)) ** 2, rel=1e-10)


@pytest.mark.parametrize("cancels", [0.0, 1e-3, 1e-6, 1e-9])
def test_the_norm_of_float64_factors_keeps_its_digits_where_directions_cancel(cancels):
    x = make(40, 30, 3, 0)
    difference = LowRank(torch.cat([x.B, -x.B * (1 + cancels)], dim=1), torch.cat([x.A, x.A]))
    assert difference.norm() == pytest.approx(cancels * x.norm(), rel=1e-4, abs=1e-14 * x.norm())


def test_a_truncated_sum_refuses_what_cannot_be_added():
    small, large = make(4, 3, 1, 0), make(5, 3, 1, 0)
    with pytest.raises(ValueError, match="different shapes"):
        LowRank.truncated_sum([small, large], [1.0, 1.0])
    with pytest.raises(ValueError, match="as many weights"):
        LowRank.truncated_sum([small], [1.0, 1.0])
    with pytest.raises(ValueError, match="at least one"):
        LowRank.truncated_sum([], [])


def test_a_truncated_sum_of_float32_and_float64_is_float64():
    found = LowRank.truncated_sum([make(6, 5, 1, 0), make(6, 5, 1, 1).to(dtype=torch.float32)], [1.0, 1.0])
    assert found.B.dtype == found.A.dtype == torch.float64


@given(PRODUCTS, st.none() | st.integers(0, 12), BALANCES)
@MODERATE
def test_truncating_twice_changes_nothing(product, rank, balance):
    once = product.truncate(rank, balance)
    assert_same(dense(once.truncate(rank, balance)), dense(once), size(product))


@given(SIZES, SIZES, st.none() | st.integers(0, 14), SEEDS, BALANCES)
@MODERATE
def test_from_dense_is_the_singular_value_decomposition(m, n, rank, seed, balance):
    matrix = torch.randn(m, n, generator=generator(seed), dtype=torch.float64)
    product = LowRank.from_dense(matrix, rank, balance=balance)
    sigma = np.linalg.svd(matrix.numpy(), compute_uv=False)
    tail = 0.0 if rank is None else float(np.sqrt((sigma[rank:] ** 2).sum()))
    assert product.rank == (min(m, n) if rank is None else min(rank, m, n))
    error = np.linalg.norm(dense(product) - matrix.numpy())
    assert error == pytest.approx(tail, rel=1e-10, abs=1e-12 * (sigma[0] + 1))


@pytest.mark.parametrize("balance", ["sqrt", "left"])
@pytest.mark.parametrize("shape", [(40, 30), (5, 8)])  # thin QR, and dense because q >= min(m, n)
def test_tolerance_drops_directions_that_are_small_compared_with_the_first(shape, balance):
    m, n = shape
    sigma = torch.tensor([8.0, 4.0, 1.0, 1e-3, 1e-8], dtype=torch.float64)
    P = torch.linalg.qr(torch.randn(m, 5, generator=generator(0), dtype=torch.float64))[0]
    Q = torch.linalg.qr(torch.randn(n, 5, generator=generator(1), dtype=torch.float64))[0]
    product = LowRank(P * sigma, Q.mT)
    for tolerance, keeps in [(0.0, 5), (1e-10, 5), (1e-6, 4), (0.1, 3), (0.3, 2), (0.75, 1)]:
        cut = product.truncate(balance=balance, tolerance=tolerance)
        assert cut.rank == keeps, tolerance
        error = np.linalg.norm(dense(cut) - dense(product))
        assert error == pytest.approx(float(sigma[keeps:].norm()), rel=1e-6, abs=1e-13)
        assert product.truncate(2, balance, tolerance=tolerance).rank == min(2, keeps)


@given(SIZES, SIZES, RANKS, BALANCES)
@MODERATE
def test_tolerance_drops_all_directions_of_a_zero_matrix(m, n, r, balance):
    assert make(m, n, r, 0, "zero").truncate(balance=balance, tolerance=1e-9).rank == 0


def test_a_negative_rank_is_refused():
    for product in (make(9, 8, 2, 0), make(2, 2, 3, 0), LowRank.zeros(4, 4)):
        with pytest.raises(ValueError, match="at least 0; got -1"):
            product.truncate(-1)
    with pytest.raises(ValueError, match="at least 0; got -2"):
        LowRank.from_dense(torch.eye(3), -2)


def test_an_unknown_balance_is_refused():
    for product in (make(9, 8, 2, 0), make(2, 2, 3, 0)):
        with pytest.raises(ValueError, match="'sqrt' or 'left'; got 'right'"):
            product.truncate(1, "right")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'sqrt' or 'left'"):
        LowRank.from_dense(torch.eye(3), balance="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(9, 8), (2, 2)])
@pytest.mark.parametrize("factor", ["B", "A"])
def test_values_that_are_not_finite_are_detected_and_refused(shape, factor, bad):
    product = make(*shape, 2, 0)
    assert product.is_finite()
    getattr(product, factor)[0, 0] = bad
    assert not product.is_finite()
    with pytest.raises(ValueError, match="not finite"):
        product.truncate(1)
    with pytest.raises(ValueError, match="not finite"):
        LowRank.from_dense(torch.full((2, 3), bad))


# -- dtypes and devices ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(30, 20), (4, 3)])
def test_half_precision_factors_are_computed_in_float32(shape, dtype):
    x, y = make(*shape, 3, 0, dtype=dtype), make(*shape, 3, 1, dtype=dtype)
    scale = size(x) + size(y)
    for got, want in [
        (x + y, dense(x) + dense(y)),
        (x - y, dense(x) - dense(y)),
        (x * 0.3, 0.3 * dense(x)),
        (LowRank.weighted_sum([x, y], [0.7, 0.1]), 0.7 * dense(x) + 0.1 * dense(y)),
        (x.truncate(), dense(x)),
    ]:
        assert got.dtype == torch.float32
        assert_same(dense(got), want, scale, 1e-5)
    assert x.dense().dtype == torch.float32
    assert_same(x.dense().double().numpy(), dense(x), scale, 1e-6)
    assert x.norm() == pytest.approx(np.linalg.norm(dense(x)), rel=1e-5)
    assert x.inner(y) == pytest.approx((dense(x) * dense(y)).sum(), abs=1e-6 * size(x) * size(y))
    from_dense = LowRank.from_dense(torch.ones(3, 4, dtype=dtype))
    assert from_dense.dtype == torch.float32
    assert_same(dense(from_dense), np.ones((3, 4)), 1.0, 1e-5)


@given(PRODUCTS, st.integers(0, 12), BALANCES)
@MODERATE
def test_float32_truncation_is_as_good_as_float32_allows(product, rank, balance):
    single = product.to(dtype=torch.float32)
    want = dense(single)
    truncated = single.truncate(rank, balance)
    assert truncated.dtype == torch.float32
    tail = float(np.sqrt((np.linalg.svd(want, compute_uv=False)[rank:] ** 2).sum()))
    error = np.linalg.norm(dense(truncated) - want)
    assert error == pytest.approx(tail, rel=1e-4, abs=1e-5 * size(single))


def test_float64_is_kept_throughout():
    x, y = make(6, 5, 2, 0), make(6, 5, 2, 1)
    for got in (
        x + y,
        x - y,
        -x,
        2 * x,
        x.truncate(1),
        (x + y + x).truncate(2),
        LowRank.from_dense(x.dense()),
    ):
        assert got.dtype == torch.float64
    assert x.dense().dtype == torch.float64


def test_a_sum_of_two_dtypes_takes_the_wider():
    x, y = make(6, 5, 2, 0), make(6, 5, 2, 1, dtype=torch.float32)
    for both in (x + y, y + x):
        assert both.dtype == torch.float64
        assert_same(dense(both), dense(x) + dense(y), size(x) + size(y))


def test_to_changes_dtype_or_device_and_nothing_else():
    x = make(6, 5, 2, 0, dtype=torch.float32)
    assert torch.equal(x.to().B, x.B)
    double = x.to(dtype=torch.float64)
    assert double.dtype == torch.float64
    assert torch.equal(double.B, x.B.double())
    assert torch.equal(double.A, x.A.double())
    meta = x.to(device="meta")
    assert meta.device.type == "meta"
    assert (meta.shape, meta.rank, meta.dtype) == (x.shape, x.rank, torch.float32)
    assert x.to(device=torch.device("cpu"), dtype=torch.bfloat16).dtype == torch.bfloat16


# -- size ------------------------------------------------------------------------------------------


def test_sums_of_huge_products_never_become_dense():
    m = n = 200_000  # dense: 160 GB in float32
    x, y = make(m, n, 2, 0, dtype=torch.float32), make(m, n, 2, 1, dtype=torch.float32)
    total = x + 0.5 * y
    # By Gram matrices in float64, which are no part of the code under test.
    B, A = total.B.double().numpy(), total.A.double().numpy()
    gram = (B.T @ B) @ (A @ A.T)
    norm = float(np.sqrt(np.trace(gram)))
    assert total.norm() == pytest.approx(norm, rel=1e-4)
    assert total.inner(total) == pytest.approx(norm**2, rel=1e-4)
    truncated = total.truncate(2)
    assert truncated.rank == 2
    sigma = np.sqrt(np.sort(np.linalg.eigvals(gram).real)[::-1])
    assert truncated.norm() == pytest.approx(float(np.sqrt((sigma[:2] ** 2).sum())), rel=1e-4)
    assert (total - truncated).norm() == pytest.approx(float(np.sqrt((sigma[2:] ** 2).sum())), rel=1e-3)
