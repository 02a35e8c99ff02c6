"""Leading singular vectors against a full SVD in numpy, float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora.algebra import spectral
from fedsmoothlora.algebra.spectral import (
    SIGN_TIE,
    dominant_triplets,
    fix_signs,
    leading_directions,
    leading_singular_triplets,
    leading_singular_vectors,
)

# What the residuals of the iteration may be, relative to the last wanted singular value.
TOLERANCE = {torch.float32: 2e-4, torch.float64: 2e-8}
BIG = [(320, 200), (200, 320), (256, 256)]  # where the iteration runs for a small count
DTYPES = [torch.float32, torch.float64]


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=draw, dtype=torch.float64))[0]


def with_spectrum(m: int, n: int, sigma, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    """A matrix with the given singular values (the rest 0) and random singular vectors."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    P, Q = orthonormal(m, len(sigma), seed), orthonormal(n, len(sigma), seed + 1)
    return ((P * sigma) @ Q.mT).to(dtype)


def spectrum(kind: str, size: int) -> np.ndarray:
    index = np.arange(size)
    return {
        "fast": 0.5**index,
        "power": 1.0 / (1 + index) ** 2,
        "cluster": np.where(index < 6, 1.0, 0.05 * 0.9 ** np.maximum(index - 6, 0)),
        "cluster across the cut": np.where(index < 11, 1.0, 0.05),
        "flat": 1.0 - 0.1 * index / size,
        "equal": np.ones(size),
        "low rank": np.where(index < 3, 3.0 - index, 0.0),
        "one": (index == 0).astype(float),
        "zero": np.zeros(size),
    }[kind]


KINDS = ["fast", "power", "cluster", "cluster across the cut", "flat", "equal", "low rank", "one", "zero"]


@pytest.fixture
def full_svds(monkeypatch):
    """Shapes of the matrices that `torch.linalg.svd` was given."""
    shapes, real = [], torch.linalg.svd

    def counted(matrix, *args, **kwargs):
        shapes.append(tuple(matrix.shape))
        return real(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    return shapes


def check(matrix: torch.Tensor, count: int) -> None:
    """Check the properties that the triplets of any matrix must have."""
    P, sigma, Q = leading_singular_vectors(matrix, count)
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    m, n = matrix.shape
    assert P.dtype == sigma.dtype == Q.dtype == dtype
    assert (tuple(P.shape), tuple(sigma.shape), tuple(Q.shape)) == ((m, count), (count,), (n, count))
    P, sigma, Q = P.double().numpy(), sigma.double().numpy(), Q.double().numpy()
    G = matrix.double().numpy()
    U, truth, Vt = np.linalg.svd(G, full_matrices=False)
    first = truth[0]
    rounding = 40 * torch.finfo(dtype).eps
    allowed = TOLERANCE[dtype] * (truth[count - 1] if count else 0.0) + rounding * first

    assert np.abs(P.T @ P - np.eye(count)).max(initial=0.0) < rounding
    assert np.abs(Q.T @ Q - np.eye(count)).max(initial=0.0) < rounding
    assert np.abs(sigma - truth[:count]).max(initial=0.0) <= allowed
    for i in range(count):
        p, q = P[:, i], Q[:, i]
        assert p.max() >= (1 - SIGN_TIE) * np.abs(p).max()  # the sign rule
        assert q.max() >= (1 - SIGN_TIE) * np.abs(q).max()
        if truth[i] > 100 * allowed:  # signs are fixed apart, so the equations hold up to one sign
            sign = np.sign(p @ G @ q)
            assert np.linalg.norm(G @ q - sign * sigma[i] * p) <= 2 * allowed
            assert np.linalg.norm(G.T @ p - sign * sigma[i] * q) <= 2 * allowed
        else:
            assert np.linalg.norm(G @ q) <= truth[i] + 2 * allowed
        others = np.delete(truth, i)
        gap = np.abs(others - truth[i]).min(initial=truth[i])
        if gap > 100 * allowed:  # the vector itself is determined
            assert abs(p @ U[:, i]) > 1 - (4 * allowed / gap) ** 2 - rounding
            assert abs(q @ Vt[i]) > 1 - (4 * allowed / gap) ** 2 - rounding
    after = truth[count] if count < len(truth) else 0.0
    if count and truth[count - 1] - after > 100 * allowed:  # the subspace is determined
        bound = 4 * np.sqrt(count) * allowed / (truth[count - 1] - after)
        assert np.linalg.norm(P - U[:, :count] @ (U[:, :count].T @ P)) <= bound
        assert np.linalg.norm(Q - Vt[:count].T @ (Vt[:count] @ Q)) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BIG)
@pytest.mark.parametrize("kind", KINDS)
def test_big_matrices_get_the_leading_triplets_whatever_the_spectrum(kind, shape, dtype):
    matrix = with_spectrum(*shape, spectrum(kind, min(shape)), dtype=dtype)
    for count in (1, 4, 6, 9):
        check(matrix, count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BIG)
def test_big_random_matrices_get_the_leading_triplets(shape, dtype):
    draw = torch.Generator().manual_seed(3)
    matrix = torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
    check(matrix, 8)
    check(torch.nn.functional.softplus(matrix), 8)  # one large direction above a random bulk


@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(0, 2**31),
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
    st.data(),
)
@settings(max_examples=120, deadline=None)
def test_small_matrices_get_the_leading_triplets_for_any_count(m, n, seed, kind, dtype, data):
    matrix = with_spectrum(m, n, spectrum(kind, min(m, n)), seed, dtype)
    check(matrix, data.draw(st.integers(0, min(m, n)), label="count"))


@given(st.integers(97, 260), st.integers(97, 260), st.integers(1, 24), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_sizes_around_the_switch_between_algorithms_agree(m, n, count, seed):
    check(with_spectrum(m, n, 0.8 ** np.arange(min(m, n)), seed, torch.float32), count)


@pytest.mark.parametrize("shape", BIG)
@pytest.mark.parametrize("kind", ["fast", "power", "cluster", "zero"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_big_matrix_with_a_decaying_spectrum_takes_no_full_svd(kind, shape, dtype, full_svds):
    matrix = with_spectrum(*shape, spectrum(kind, min(shape)), dtype=dtype)
    leading_singular_vectors(matrix, 4)
    assert full_svds  # the small core
    assert all(max(core) < 40 for core in full_svds)


@pytest.mark.parametrize("shape", BIG)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flat_spectrum_falls_back_to_the_full_svd(shape, dtype, full_svds):
    matrix = with_spectrum(*shape, spectrum("flat", min(shape)), dtype=dtype)
    leading_singular_vectors(matrix, 4)
    assert full_svds.count(shape) == 1


def test_small_matrices_and_large_counts_take_the_full_svd(full_svds):
    for shape, count in [((90, 400), 2), ((400, 90), 2), ((128, 128), 60)]:
        leading_singular_vectors(with_spectrum(*shape, spectrum("fast", min(shape))), count)
        assert full_svds == [shape]
        full_svds.clear()


@pytest.mark.parametrize(
    "scale",
    [
        1e-30,
        1e-22,
        *(1e-16, 1e-8, 1e8, 1e16, 1e25),
    ],
)
def test_the_vectors_do_not_depend_on_the_scale_of_the_matrix(scale):
    sigma = 0.97 ** np.arange(200)
    unit = with_spectrum(256, 200, sigma, dtype=torch.float32)
    P, _, Q = leading_singular_vectors(unit, 8)
    P_scaled, sigma_scaled, Q_scaled = leading_singular_vectors(unit * scale, 8)
    assert np.allclose(sigma_scaled.double().numpy(), scale * sigma[:8], rtol=1e-4, atol=0)
    for got, want in [(P_scaled, P), (Q_scaled, Q)]:
        assert float((got * want).sum(dim=0).min()) > 1 - 1e-4


# -- purity ----------------------------------------------------------------------------------------


def triplets_of(matrix: torch.Tensor, count: int = 4) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in leading_singular_vectors(matrix, count)]


@pytest.mark.parametrize("kind", ["fast", "flat"])
def test_the_same_matrix_gives_the_same_triplets_bit_for_bit(kind):
    matrix = with_spectrum(200, 150, spectrum(kind, 150), dtype=torch.float32)
    kept = matrix.clone()
    first = triplets_of(matrix)
    torch.manual_seed(123)  # the global generator's state must not matter
    spectral._start_block.cache_clear()
    leading_singular_vectors(with_spectrum(130, 150, spectrum("fast", 130)), 4)  # nor what was asked before
    second = triplets_of(matrix)
    for tensor in second:
        tensor.zero_()  # nor what a caller does to the answer
    third = triplets_of(matrix)
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))
    assert torch.equal(matrix, kept)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    spectral._start_block.cache_clear()
    before = torch.get_rng_state()
    leading_singular_vectors(with_spectrum(200, 150, spectrum("fast", 150)), 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_layout_does_not_matter():
    matrix = with_spectrum(200, 150, spectrum("fast", 150))
    for a, b in zip(triplets_of(matrix), triplets_of(matrix.mT.contiguous().mT), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(20, 12), (200, 150)])
def test_bfloat16_is_computed_in_float32(shape):
    check(with_spectrum(*shape, spectrum("fast", min(shape))).to(torch.bfloat16), 4)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "count"), [((5, 3), 4), ((3, 5), 4), ((5, 3), -1), ((200, 150), 151)])
def test_a_count_out_of_range_is_refused(shape, count):
    with pytest.raises(ValueError, match=f"has {min(shape)} singular vectors; {count} were requested"):
        leading_singular_vectors(torch.zeros(shape), count)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(5, 3), (200, 150)])
def test_a_matrix_that_is_not_finite_is_refused(shape, bad):
    matrix = torch.zeros(shape)
    matrix[1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        leading_singular_vectors(matrix, 2)


# -- signs -----------------------------------------------------------------------------------------


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**31), st.booleans(), st.sampled_from(DTYPES))
@settings(max_examples=80, deadline=None)
def test_fix_signs_makes_the_largest_entry_positive_and_changes_only_signs(rows, columns, seed, ties, dtype):
    vectors = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    if ties:
        vectors = vectors.round()  # ties, and zero columns
    fixed = fix_signs(vectors)
    assert fixed.shape == vectors.shape
    assert fixed.dtype == dtype
    for before, after in zip(vectors.mT, fixed.mT, strict=True):
        assert torch.equal(after, before) or torch.equal(after, -before)
        if rows:
            largest = after.abs() >= (1 - SIGN_TIE) * after.abs().max()
            assert after[largest][0] >= 0
    assert torch.equal(fix_signs(fixed), fixed)
    assert torch.equal(fix_signs(-vectors), fixed)


@pytest.mark.parametrize("rounding", [-1e-6, 0.0, 1e-6])
def test_of_entries_that_agree_up_to_rounding_the_first_is_positive(rounding):
    vectors = torch.tensor([[0.1, 0.1], [0.7, -0.7], [-0.7, 0.7]])
    vectors[2] += rounding
    fixed = fix_signs(vectors)
    assert torch.equal(fixed[1], torch.tensor([0.7, 0.7]))
    assert torch.equal(fixed.abs(), vectors.abs())


# -- directions of a start -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", BIG)
@pytest.mark.parametrize("kind", ["fast", "power", "cluster", "low rank", "one", "zero"])
def test_directions_of_a_decaying_spectrum_are_the_singular_vectors(kind, shape, dtype):
    sigma = spectrum(kind, min(shape))
    matrix = with_spectrum(*shape, sigma, dtype=dtype)
    P, found, Q = leading_directions(matrix, 8)
    noise = 40 * torch.finfo(dtype).eps
    assert np.abs(found.double().numpy() - sigma[:8]).max() <= 1e-4 * sigma[7] + noise
    U, _, Vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    for vectors, exact in [(P.double().numpy(), U), (Q.double().numpy(), Vt.T)]:
        assert np.abs(vectors.T @ vectors - np.eye(8)).max() < noise
        if sigma[5] - sigma[6] > 1e-3:  # the space of the first six is determined
            assert np.linalg.norm(exact[:, :6].T @ vectors[:, :6]) ** 2 > 6 * 0.9999


@given(
    st.integers(97, 200), st.integers(97, 200), st.integers(1, 12), st.floats(0.5, 1.0), st.integers(0, 99)
)
@settings(max_examples=20, deadline=None)
def test_directions_overlap_with_the_leading_ones_however_slowly_the_spectrum_decays(
    m, n, count, decay, seed
):
    values = decay ** np.arange(min(m, n))
    values[count:] *= 0.98  # the space of the first is determined
    matrix = with_spectrum(m, n, values, seed, torch.float32)
    P, sigma, Q = leading_directions(matrix, count)
    exact = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    assert np.abs(sigma.double().numpy() - exact[1][:count]).max() <= 5e-3 * exact[1][0]
    for vectors, basis in [(P, exact[0]), (Q, exact[2].T)]:
        # Of 1,500 spectra near the limit of three steps, the worst overlap was 0.9898.
        assert np.linalg.norm(basis[:, :count].T @ vectors.double().numpy()) ** 2 > 0.98 * count


def test_a_decaying_spectrum_takes_three_steps_and_a_flat_one_the_full_svd(full_svds):
    leading_directions(with_spectrum(256, 200, spectrum("fast", 200)), 4)
    assert full_svds == [(16, 16)]  # the small core
    full_svds.clear()
    leading_directions(with_spectrum(256, 200, spectrum("flat", 200)), 4)
    assert full_svds[0] == (16, 16)
    assert full_svds[-1] == (256, 200)


def test_directions_of_a_small_matrix_are_those_of_its_full_svd():
    matrix = with_spectrum(60, 50, spectrum("flat", 50))
    for found, exact in zip(leading_directions(matrix, 4), leading_singular_vectors(matrix, 4), strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize("shape", [(40, 30), (320, 200)])
def test_triplets_have_matching_signs(shape):
    matrix = with_spectrum(*shape, spectrum("fast", min(shape)))
    P, sigma, Q = leading_singular_triplets(matrix, 6)
    assert torch.equal(fix_signs(P), P)
    error = torch.linalg.matrix_norm((P * sigma) @ Q.mT - matrix, ord=2)
    assert float(error) == pytest.approx(0.5**6, rel=1e-5)


def test_dominant_triplets_hold_nearly_all_that_the_best_ones_hold_however_flat_the_spectrum() -> None:
    generator = torch.Generator().manual_seed(3)
    for m, n, noise in ((400, 300, 0.0), (400, 300, 0.3), (300, 400, 100.0)):
        matrix = torch.randn(m, 8, generator=generator) @ torch.randn(8, n, generator=generator)
        matrix += noise * torch.randn(m, n, generator=generator)
        P, sigma, Q = dominant_triplets(matrix, 8)
        assert torch.allclose(P.mT @ P, torch.eye(8), atol=1e-5)
        assert torch.allclose(Q.mT @ Q, torch.eye(8), atol=1e-5)
        best = torch.linalg.svdvals(matrix)[:8].square().sum()
        kept = (P.mT @ matrix).square().sum()
        assert kept > (0.8 if noise > 1 else 0.99) * best
        assert torch.allclose(P.mT @ matrix @ Q, torch.diag(sigma), atol=1e-3 * float(sigma[0]))
