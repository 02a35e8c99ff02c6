"""Sums of fixed-point numbers are exact for any number of clients, and means differ by rounding only."""

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedsmoothlora.errors import NotFiniteError
from fedsmoothlora.secure_aggregation.fixed_point import FixedPoint

BITS: st.SearchStrategy[Literal[16, 32]] = st.sampled_from([16, 32])


def a_code(clients: int, bits: Literal[16, 32] = 32, bound: float = 1.0) -> FixedPoint:
    return FixedPoint(shapes={"x": (4,)}, bounds={"x": bound}, clients=clients, bits=bits)


def total(code: FixedPoint, tensors: Any, weights: Any) -> Any:
    found = np.zeros(code.size, code.dtype)
    for tensor, weight in zip(tensors, weights, strict=True):
        found += code.encode({"x": tensor}, weight)
    return found


@given(clients=st.integers(1, 2**15 - 1), bits=BITS, sign=st.sampled_from([-1.0, 1.0]))
def test_the_sum_of_the_largest_numbers_of_all_clients_does_not_overflow(
    clients: int, bits: Literal[16, 32], sign: float
) -> None:
    code = a_code(clients, bits)
    one = code.encode({"x": np.full(4, sign)}, 1.0)
    largest = (one.astype(np.uint64) * clients).astype(code.dtype)  # the sum over all clients, modulo 2^bits
    mean = code.decode(largest, clients)
    assert mean.tensors["x"].tolist() == [sign] * 4
    assert mean.weight == clients


@settings(max_examples=60, deadline=None)
@given(data=st.data(), clients=st.integers(1, 9), bits=BITS, bound=st.floats(1e-6, 1e6))
def test_the_mean_differs_from_the_exact_one_by_rounding_only(
    data: st.DataObject, clients: int, bits: Literal[16, 32], bound: float
) -> None:
    code = a_code(clients, bits, bound)
    numbers = st.floats(-bound, bound, allow_nan=False)
    tensors = [data.draw(arrays(np.float64, 4, elements=numbers)) for _ in range(clients)]
    shares = [data.draw(st.integers(1, code.limit)) for _ in range(clients)]
    weights = [share / code.limit for share in shares]  # weights that the code does not round
    mean = code.decode(total(code, tensors, weights), clients)
    exact = np.average(tensors, axis=0, weights=weights)
    most = clients * bound / (2 * code.limit * math.fsum(weights))
    assert np.all(np.abs(mean.tensors["x"] - exact) <= most * (1 + 1e-9))
    assert mean.weight == pytest.approx(math.fsum(weights), rel=1e-12)
    assert mean.saturated == 0


def test_weights_are_rounded_before_they_multiply() -> None:
    code = a_code(clients=2, bits=16)
    found = code.decode(total(code, [np.full(4, 0.5), np.full(4, 0.5)], [1 / 3, 0.777]), 2)
    assert np.allclose(found.tensors["x"], 0.5, atol=2 / (2 * code.limit * found.weight))


def test_numbers_above_the_bound_are_cut_and_counted() -> None:
    code = a_code(clients=2, bound=1.0)
    tensors = [np.array([3.0, -3.0, 1.0, 0.0]), np.array([2.0, 0.0, -1.0, 0.0])]
    mean = code.decode(total(code, tensors, [1.0, 1.0]), 2)
    assert mean.saturated == 3
    assert mean.tensors["x"] == pytest.approx([1.0, -0.5, 0.0, 0.0], abs=1e-8)


def test_tensors_keep_their_shapes_and_names() -> None:
    code = FixedPoint(shapes={"a": (2, 3), "b": (), "c": (0,)}, bounds={"a": 6, "b": 1, "c": 1}, clients=3)
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    mean = code.decode(code.encode({"a": a, "b": np.array(0.25), "c": np.zeros(0)}, 1.0), 1)
    assert np.allclose(mean.tensors["a"], a)
    assert mean.tensors["b"] == pytest.approx(0.25)
    assert mean.tensors["c"].shape == (0,)


@pytest.mark.parametrize("least", [0.1, 1.0])
def test_a_site_cannot_magnify_the_sum_of_the_others_by_its_weight(least: float) -> None:
    """It sends the negative of the others' weights, so that the sum of the weights is almost 0."""
    code = replace(a_code(clients=3), least_weight=least)
    honest = code.encode({"x": np.full(4, 0.5)}, 1.0)
    hostile = np.zeros(code.size, np.int64)
    hostile[-2:] = -2 * code.limit + code.limit // 1000, -5
    found = honest + honest + hostile.astype(code.dtype)
    if least == 1.0:  # the divisor is known, and a count below 0 does not end the run
        mean = code.decode(found, 3)
        assert mean.tensors["x"] == pytest.approx(np.full(4, 1 / 3), rel=1e-6)
        assert (mean.weight, mean.saturated) == (3.0, 0)
    else:
        with pytest.raises(ValueError, match=r"weights of 3 sites is 0\.0009\d+; it must be from 0\.3 to 3"):
            code.decode(found, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(NotFiniteError, match="tensor x"):
        a_code(clients=2).encode({"x": np.array([0, value, 0, 0])}, 1.0)


@pytest.mark.parametrize("weight", [0.0, -0.5, 1.5, math.nan, 1e-12])
def test_weights_outside_the_range_are_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="the weight is"):
        a_code(clients=2).encode({"x": np.zeros(4)}, weight)


def test_other_names_and_shapes_are_refused() -> None:
    code = a_code(clients=2)
    with pytest.raises(ValueError, match="they must be"):
        code.encode({"y": np.zeros(4)}, 1.0)
    with pytest.raises(ValueError, match="has the shape"):
        code.encode({"x": np.zeros(5)}, 1.0)
    with pytest.raises(ValueError, match="are needed"):
        code.decode(np.zeros(3, np.uint32), 1)
    with pytest.raises(ValueError, match="weights of 1 sites is 0; it must be from"):
        code.decode(np.zeros(code.size, code.dtype), 1)


def test_more_clients_than_the_integers_can_add_up_are_refused() -> None:
    a_code(clients=2**15 - 1, bits=16)
    with pytest.raises(ValueError, match="from 1 to 32767"):
        a_code(clients=2**15, bits=16)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_bounds_must_be_positive_and_finite(bound: float) -> None:
    with pytest.raises(ValueError, match="positive and finite"):
        a_code(clients=2, bound=bound)
