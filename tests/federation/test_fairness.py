"""Summaries over clients: the worst tenth, and which metrics are summarised."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.federation.fairness import fairness, worst_tenth
from fedsmoothlora.federation.records import Metric
from fedsmoothlora.reports.metrics import is_known, larger_is_better

VALUES = st.lists(st.floats(0, 1), min_size=2, max_size=45)


@given(VALUES, st.booleans())
def test_the_worst_tenth_is_the_mean_of_the_worst_rounded_up_tenth(values: list[float], larger: bool) -> None:
    count = -(-len(values) // 10)
    ordered = np.sort(values)
    wanted = ordered[:count].mean() if larger else ordered[-count:].mean()
    assert worst_tenth(values, larger_is_better=larger) == pytest.approx(wanted)


@pytest.mark.parametrize(("clients", "counted"), [(1, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_a_tenth_is_rounded_up(clients: int, counted: int) -> None:
    values = [float(value) for value in range(clients)]
    assert worst_tenth(values, larger_is_better=True) == np.mean(values[:counted])


def test_no_clients_have_no_worst_tenth() -> None:
    with pytest.raises(ValueError, match="no clients"):
        worst_tenth([], larger_is_better=True)


@given(VALUES)
def test_summaries_do_not_depend_on_the_order_of_clients(values: list[float]) -> None:
    metrics = [Metric(str(index), "accuracy", value) for index, value in enumerate(values)]
    there = fairness(metrics, "accuracy", larger_is_better=True)
    back = fairness(metrics[::-1], "accuracy", larger_is_better=True)
    for one, other in zip(there, back, strict=True):
        assert one.value == pytest.approx(other.value)
    found = {one.name: one.value for one in there}
    assert found["accuracy_mean_over_clients"] == pytest.approx(np.mean(values))
    assert found["accuracy_std_over_clients"] == pytest.approx(np.std(values))
    assert found["accuracy_worst_tenth"] <= found["accuracy_mean_over_clients"] + 1e-12


def test_models_of_clients_are_summarised_apart_and_other_metrics_are_not() -> None:
    names = ("accuracy", "personal_accuracy", "tuned_accuracy", "own_accuracy", "on_test_accuracy", "loss")
    metrics = [Metric(client, name, 0.5) for client in ("a", "b") for name in names]
    metrics += [Metric(None, "accuracy", 0.1), Metric("c", "personal_accuracy", math.nan)]
    found = fairness(metrics, "accuracy", larger_is_better=True)
    assert len(found) == 5 * 3
    assert all(one.client is None and one.value in (0.0, 0.5) for one in found)
    assert not any(one.name.startswith("loss") for one in found)
    assert all(is_known(one.name) for one in found)


def test_a_single_client_has_no_summary() -> None:
    assert fairness([Metric("a", "accuracy", 0.5)], "accuracy", larger_is_better=True) == []


def test_a_smaller_spread_is_better_and_the_worst_tenth_has_the_direction_of_its_metric() -> None:
    assert not larger_is_better("accuracy_std_over_clients")
    assert larger_is_better("personal_accuracy_worst_tenth")
    assert not larger_is_better("tuned_loss_worst_tenth")
