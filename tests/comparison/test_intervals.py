"""Student's t against printed tables, and differences against a worked example."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.comparison.intervals import paired_difference, summary, t_distribution, t_quantile

# By degrees of freedom, the 97.5 % and 99.5 % points that textbooks print.
PRINTED = {
    1: (12.706, 63.657),
    2: (4.303, 9.925),
    3: (3.182, 5.841),
    4: (2.776, 4.604),
    5: (2.571, 4.032),
    9: (2.262, 3.250),
    10: (2.228, 3.169),
    29: (2.045, 2.756),
    30: (2.042, 2.750),
    100: (1.984, 2.626),
}


@pytest.mark.parametrize("degrees", PRINTED)
def test_quantiles_are_those_of_the_printed_table(degrees: int) -> None:
    for probability, value in zip((0.975, 0.995), PRINTED[degrees], strict=True):
        assert round(t_quantile(probability, degrees), 3) == value
        assert round(t_quantile(1 - probability, degrees), 3) == -value


def test_with_many_degrees_it_is_the_normal_distribution() -> None:
    assert t_quantile(0.975, 20_000) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-3)


@given(st.floats(-30, 30), st.integers(1, 60))
def test_the_distribution_is_the_integral_of_its_density(t: float, degrees: int) -> None:
    def density(x: float) -> float:
        log = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - 0.5 * math.log(degrees * math.pi)
        return math.exp(log - (degrees + 1) / 2 * math.log1p(x * x / degrees))

    steps = 2000  # Simpson's rule from 0
    width = t / steps
    inner = sum((4 if k % 2 else 2) * density(k * width) for k in range(1, steps))
    integral = width / 3 * (density(0) + density(t) + inner)
    assert t_distribution(t, degrees) == pytest.approx(0.5 + integral, abs=1e-6)


@pytest.mark.parametrize(("probability", "degrees"), [(0.0, 3), (1.0, 3), (0.9, 0)])
def test_what_has_no_quantile_is_refused(probability: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="must be within"):
        t_quantile(probability, degrees)


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
