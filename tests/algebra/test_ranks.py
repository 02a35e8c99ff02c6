"""Ranks by energy: the smallest that holds a share, and the most energy within a budget of bytes."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.ranks import allocated_ranks, leading_singular_values, rank_for_share

ENERGY = st.one_of(st.just(0.0), st.floats(1e-3, 10.0))
SPECTRUM = st.lists(ENERGY, max_size=4).map(lambda values: sorted(values, reverse=True))


def allocated(spectra: Sequence[Sequence[float]], costs: Sequence[int], budget: int) -> list[int]:
    energies = {str(i): torch.tensor(values, dtype=torch.float64) for i, values in enumerate(spectra)}
    found = allocated_ranks(energies, lambda name, rank: costs[int(name)] * rank, budget)
    assert list(found) == list(energies)
    return list(found.values())


def energy(spectra: Sequence[Sequence[float]], ranks: Sequence[int]) -> float:
    return sum(sum(values[:k]) for values, k in zip(spectra, ranks, strict=True))


def best(spectra: Sequence[Sequence[float]], costs: Sequence[int], budget: int) -> float:
    """The most energy of all choices of ranks within the budget, by trying each."""
    return max(
        energy(spectra, ranks)
        for ranks in product(*(range(len(values) + 1) for values in spectra))
        if sum(k * cost for k, cost in zip(ranks, costs, strict=True)) <= budget
    )


@given(st.lists(SPECTRUM, min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 60))
@settings(max_examples=150, deadline=None)
def test_no_choice_of_ranks_has_more_energy_where_directions_cost_the_same(
    spectra: list[list[float]], cost: int, budget: int
) -> None:
    costs = [cost] * len(spectra)
    found = allocated(spectra, costs, budget)
    assert sum(found) * cost <= budget
    assert energy(spectra, found) == pytest.approx(best(spectra, costs, budget))


@given(
    st.lists(st.tuples(SPECTRUM, st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 60),
)
@settings(max_examples=150, deadline=None)
def test_the_bytes_stay_within_the_budget_and_at_most_one_direction_is_missing(
    layers: list[tuple[list[float], int]], budget: int
) -> None:
    spectra, costs = [one for one, _ in layers], [cost for _, cost in layers]
    found = allocated(spectra, costs, budget)
    spent = sum(k * cost for k, cost in zip(found, costs, strict=True))
    assert spent <= budget
    missing = [values[k] for values, k in zip(spectra, found, strict=True) if k < len(values)]
    assert best(spectra, costs, budget) <= energy(spectra, found) + max(missing, default=0.0) + 1e-9
    for values, k, cost in zip(spectra, found, costs, strict=True):  # nothing that fits is left
        assert k == len(values) or not values[k] or spent + cost > budget
        assert all(values[:k])  # directions without energy are never sent


@given(st.lists(st.floats(0.1, 10.0), min_size=6, max_size=6), st.integers(1, 3), st.integers(2, 5))
@settings(max_examples=50, deadline=None)
def test_layers_of_one_shape_and_spectrum_get_the_fixed_rank(
    values: list[float], rank: int, layers: int
) -> None:
    spectra = [sorted(values, reverse=True)] * layers
    assert allocated(spectra, [7] * layers, 7 * rank * layers) == [rank] * layers


def test_a_layer_with_all_energy_gets_all_bytes_and_the_remainder_goes_where_it_fits() -> None:
    assert allocated([[9.0, 8.0, 7.0], [1.0, 1.0]], [2, 2], 6) == [3, 0]
    # A second direction of the first layer does not fit; two of the cheap layer do.
    assert allocated([[9.0, 8.0], [0.1, 0.1, 0.1]], [5, 1], 7) == [1, 2]
    assert allocated([[0.0, 0.0], []], [1, 1], 9) == [0, 0]


@given(st.lists(st.floats(0, 10), max_size=6), st.floats(0.01, 1), st.floats(0, 5))
def test_the_rank_is_the_smallest_that_holds_the_share(
    values: list[float], share: float, tail: float
) -> None:
    energies = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    total = float(energies.sum()) + tail
    k = rank_for_share(energies, share, total)
    if not float(energies.sum()):
        assert k == 0
        return
    held = energies.cumsum(0)
    assert k == len(values) or float(held[k - 1]) >= share * total
    assert k == 1 or float(held[k - 2]) < share * total


@pytest.mark.parametrize("shape", [(12, 9), (130, 110)])
def test_singular_values_are_those_of_numpy_for_factors_and_for_matrices(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    m, n = shape
    B, A = torch.randn(m, 4, generator=draw), torch.randn(4, n, generator=draw)
    low = LowRank(B, A)
    wanted = np.linalg.svd(low.dense().double().numpy(), compute_uv=False)
    for matrix in (low, low.dense()):
        np.testing.assert_allclose(leading_singular_values(matrix, 3).numpy(), wanted[:3], rtol=1e-4)
        assert len(leading_singular_values(matrix, 6)) == 4
    assert len(leading_singular_values(torch.zeros(m, n), 3)) == 0
