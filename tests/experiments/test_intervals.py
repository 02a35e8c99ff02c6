"""Confidence intervals against printed tables, recorded values and a worked example."""

import math
import statistics

import pytest

from fedsmoothlora.experiments.intervals import paired_difference, summary

# By degrees of freedom, the 97.5 % point of Student's t that textbooks print.
PRINTED = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    9: 2.262,
    10: 2.228,
    29: 2.045,
    30: 2.042,
    100: 1.984,
}


@pytest.mark.parametrize("degrees", PRINTED)
def test_half_the_interval_is_the_printed_quantile_of_standard_errors(degrees: int) -> None:
    values = [math.sin(k) for k in range(degrees + 1)]
    found = paired_difference(values, [0.0] * len(values))
    standard_error = statistics.stdev(values) / math.sqrt(len(values))
    assert round((found.high - found.mean) / standard_error, 3) == PRINTED[degrees]
    assert round((found.mean - found.low) / standard_error, 3) == PRINTED[degrees]


@pytest.mark.parametrize(
    ("values", "baseline", "low", "high"),
    [
        ([0.5, 0.25], [0.125, 0.5], -3.9081889800545864, 4.033188980054586),
        ([0.912, 0.907, 0.921], [0.905, 0.903, 0.9], -0.011873831865399422, 0.03320716519873278),
        ([11, 13, 12, 15, 14], [10, 11, 9, 11, 9], 1.0367568385224428, 4.963243161477557),
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], 1.0, 1.0),
    ],
)
def test_intervals_equal_those_of_earlier_versions(
    values: list[float], baseline: list[float], low: float, high: float
) -> None:
    """Recorded by bisection of the exact distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    found = paired_difference(values, baseline)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)


def test_every_value_needs_a_baseline() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1.0, 2.0], [1.0])


def test_a_worked_example_of_paired_differences() -> None:
    """d = 1, 2, 3, 4, 5: mean 3, sd 1.5811, t(4) = 2.776, half the interval 2.776 * 1.5811 / sqrt(5)."""
    found = paired_difference([11, 13, 12, 15, 14], [10, 11, 9, 11, 9])
    assert found.mean == 3
    assert found.low == pytest.approx(3 - 1.963, abs=1e-3)
    assert found.high == pytest.approx(3 + 1.963, abs=1e-3)
    assert found.verdict(larger_is_better=True) == "better"
    assert found.verdict(larger_is_better=False) == "worse"


def test_an_interval_with_zero_in_it_shows_no_difference() -> None:
    found = paired_difference([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    assert found.low < 0 < found.high
    assert found.verdict(larger_is_better=True) == "no difference seen"


def test_one_pair_has_no_interval() -> None:
    found = paired_difference([2.0], [1.0])
    assert (found.mean, found.n) == (1.0, 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.verdict(larger_is_better=True) == "one seed only"
    assert paired_difference([], []).verdict(larger_is_better=True) == "no pair"


def test_the_standard_deviation_is_the_samples() -> None:
    found = summary([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert (found.mean, found.n) == (5.0, 8)
    assert found.std == pytest.approx(math.sqrt(32 / 7))
    assert math.isnan(summary([1.0]).std)
    assert math.isnan(summary([]).mean)
