"""Robust means against dense references, at their breakdown points, and where all uploads are the same."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.robust import (
    capped_weights,
    geometric_median,
    gram,
    median,
    multi_krum,
    squared_distances,
    trimmed_mean,
)

SCALES = {"q": 0.5, "v": 3.0}


def uploads(count: int, seed: int, rank: int = 2) -> list[dict]:
    draw = torch.Generator().manual_seed(seed)

    def product(m: int, n: int) -> LowRank:
        return LowRank(torch.randn(m, rank, generator=draw), torch.randn(rank, n, generator=draw))

    return [
        {"q": product(7, 5), "v": product(4, 6), "bias": torch.randn(3, generator=draw)} for _ in range(count)
    ]


def dense(upload: dict) -> torch.Tensor:
    """The upload as one vector, every layer times its scale, in float64."""
    parts = [
        SCALES.get(name, 1.0)
        * (value.to(dtype=torch.float64).dense() if isinstance(value, LowRank) else value)
        for name, value in upload.items()
    ]
    return torch.cat([part.double().flatten() for part in parts])


def mixed(weights: list[float], vectors: torch.Tensor) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64) @ vectors


@given(st.integers(1, 6), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_distances_are_those_of_the_dense_matrices(count: int, seed: int) -> None:
    found = uploads(count, seed)
    vectors = torch.stack([dense(upload) for upload in found])

    torch.testing.assert_close(gram(found, SCALES), vectors @ vectors.T)
    torch.testing.assert_close(squared_distances(gram(found, SCALES)), torch.cdist(vectors, vectors) ** 2)


@given(st.integers(3, 7), st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_the_geometric_median_minimises_the_sum_of_distances(count: int, seed: int) -> None:
    found = uploads(count, seed)
    vectors = torch.stack([dense(upload) for upload in found]).numpy()
    counts = [1.0 + (seed >> i) % 3 for i in range(count)]

    def objective(point: np.ndarray) -> float:
        return float(np.dot(counts, np.linalg.norm(vectors - point, axis=1)))

    weights = geometric_median(gram(found, SCALES), counts)
    ours = objective(mixed(weights, torch.from_numpy(vectors)).numpy())
    reference = optimize.minimize(objective, vectors.mean(axis=0), method="BFGS", options={"gtol": 1e-9})

    assert math.isclose(sum(weights), 1, rel_tol=1e-12)
    assert ours <= reference.fun * (1 + 1e-6)


@pytest.mark.parametrize("size", [1e2, 1e6, 1e12])
def test_two_of_five_uploads_cannot_move_the_geometric_median_far(size: float) -> None:
    vectors = torch.stack([dense(upload) for upload in uploads(5, 0)])
    vectors[3:] = size
    weights = geometric_median(vectors @ vectors.T, [1] * 5)

    honest = vectors[:3]
    radius = float((honest - honest.mean(dim=0)).norm(dim=1).max())
    # Of a share alpha < 1/2 of outliers: at most 2 (1 - alpha) / (1 - 2 alpha) times the honest radius.
    bound = 2 * (1 - 0.4) / (1 - 0.8) * radius
    assert float((mixed(weights, vectors) - honest.mean(dim=0)).norm()) <= bound


def test_multi_krum_matches_the_written_out_rule() -> None:
    vectors = np.stack([dense(upload).numpy() for upload in uploads(7, 3)])
    vectors[2] += 10
    vectors[5] -= 10
    f = 2
    scores = []
    for i, one in enumerate(vectors):
        distances = sorted(float(np.sum((one - other) ** 2)) for j, other in enumerate(vectors) if j != i)
        scores.append(sum(distances[: 7 - f - 2]))
    chosen = sorted(range(7), key=lambda i: scores[i])[: 7 - f]

    weights = multi_krum(torch.from_numpy(vectors @ vectors.T), f)

    assert weights == pytest.approx([0.2 if i in chosen else 0 for i in range(7)])
    assert weights[2] == weights[5] == 0


def test_multi_krum_needs_two_f_plus_three_uploads() -> None:
    with pytest.raises(ValueError, match="needs 5; got 4"):
        multi_krum(torch.eye(4, dtype=torch.float64), 1)


@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_trimmed_means_and_medians_are_those_of_scipy_and_numpy(count: int, f: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    values = [torch.randn(3, 4, generator=draw) for _ in range(count)]
    stacked = torch.stack(values).double().numpy()

    np.testing.assert_allclose(median(values).numpy(), np.median(stacked, axis=0))
    if count <= 2 * f:
        with pytest.raises(ValueError, match=f"needs more than {2 * f}"):
            trimmed_mean(values, f)
    else:
        expected = stats.trim_mean(stacked, (f + 1e-9) / count, axis=0)
        np.testing.assert_allclose(trimmed_mean(values, f).numpy(), expected)


@given(st.integers(3, 8), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_the_order_of_uploads_changes_nothing(count: int, seed: int) -> None:
    found = uploads(count, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    products = gram(found, SCALES)
    turned = products[order][:, order]

    straight = geometric_median(products, [1] * count)
    assert geometric_median(turned, [1] * count) == pytest.approx([straight[i] for i in order], abs=1e-8)
    if count >= 5:
        straight = multi_krum(products, 1)
        assert multi_krum(turned, 1) == pytest.approx([straight[i] for i in order])


def test_equal_uploads_give_the_plain_mean() -> None:
    (one,) = uploads(1, 0)
    products = gram([one] * 5, SCALES)

    assert geometric_median(products, [1, 2, 3, 4, 5]) == pytest.approx([n / 15 for n in range(1, 6)])
    assert sum(multi_krum(products, 1)) == pytest.approx(1)
    torch.testing.assert_close(trimmed_mean([one["bias"]] * 5, 1), one["bias"].double())


@given(
    st.lists(st.integers(1, 10**6), min_size=1, max_size=8),
    st.floats(0.05, 1.0),
)
@settings(max_examples=200, deadline=None)
def test_capped_weights_are_a_distribution_below_the_cap_in_the_order_of_samples(
    counts: list[int], largest: float
) -> None:
    weights = capped_weights(counts, largest)

    assert sum(weights) == pytest.approx(1)
    assert max(weights) <= max(largest, 1 / len(counts)) * (1 + 1e-9)
    assert sorted(zip(counts, weights, strict=True)) == sorted(
        zip(counts, weights, strict=True), key=lambda pair: (pair[0], pair[1])
    )
    free = [(n, w) for n, w in zip(counts, weights, strict=True) if w < largest * (1 - 1e-9)]
    if largest * len(counts) > 1 and free:  # those below the cap keep their proportions
        first, weight = free[0]
        assert [w for _, w in free] == pytest.approx([weight * n / first for n, _ in free])


def test_clients_without_samples_share_what_the_cap_takes_from_the_others() -> None:
    assert capped_weights([10, 0, 0], 0.5) == pytest.approx([0.5, 0.25, 0.25])
    assert capped_weights([0, 5, 5, 0], 0.4) == pytest.approx([0.1, 0.4, 0.4, 0.1])


def test_a_cap_that_no_client_reaches_changes_nothing() -> None:
    assert capped_weights([1, 2, 1], 0.5) == pytest.approx([0.25, 0.5, 0.25])
    assert capped_weights([1, 98, 1], 0.5) == pytest.approx([0.25, 0.5, 0.25])
