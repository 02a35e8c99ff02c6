"""Schedules against the formulas of the paper, in numpy."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora.algebra.schedules import learning_rate_at, zeta_at

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "iid_constant.json").read_text())
UNIT = st.floats(0, 1)
MODERATE = settings(max_examples=60, deadline=None)


@given(UNIT, UNIT, st.integers(1, 60))
@MODERATE
def test_each_schedule_is_its_formula_in_every_round(zeta, floor, rounds):
    t = np.arange(rounds)
    want = {
        "constant": np.full(rounds, zeta),
        "cosine": floor + (zeta - floor) / 2 * (1 + np.cos(np.pi * t / rounds)),
        "linear": zeta - (zeta - floor) * t / rounds,
    }
    for schedule, values in want.items():
        got = [zeta_at(i, rounds, schedule=schedule, zeta=zeta, floor=floor) for i in range(rounds)]
        assert np.allclose(got, values, rtol=1e-12, atol=1e-15)


@given(st.sampled_from(["cosine", "linear"]), st.floats(0.1, 1), st.integers(1, 60))
@MODERATE
def test_zeta_starts_at_zeta_falls_and_never_reaches_its_floor(schedule, zeta, rounds):
    floor = zeta / 4
    values = [zeta_at(t, rounds, schedule=schedule, zeta=zeta, floor=floor) for t in range(rounds)]
    assert values[0] == pytest.approx(zeta, rel=1e-15)
    assert all(a > b for a, b in pairwise(values))
    assert min(values) > floor


def test_zeta_is_constant_at_one_unless_set():
    assert [zeta_at(t, 5) for t in range(5)] == [1.0] * 5


@given(st.floats(1e-8, 10), st.floats(0, 10), st.integers(1, 60))
@MODERATE
def test_the_learning_rate_is_a_half_cosine_by_round(lr, lr_min, rounds):
    t = np.arange(rounds)
    want = lr_min + (lr - lr_min) / 2 * (1 + np.cos(np.pi * t / rounds))
    got = [learning_rate_at(i, rounds, lr, lr_min) for i in range(rounds)]
    assert np.allclose(got, want, rtol=1e-12, atol=1e-14)


def test_learning_rates_and_zetas_are_those_of_the_published_run():
    rounds = GOLDEN["rounds"]
    for t, record in enumerate(rounds):
        assert learning_rate_at(t, len(rounds), 0.01) == pytest.approx(record["lr"], rel=1e-12)
        if record["zeta"] is not None:
            assert zeta_at(t, len(rounds)) == record["zeta"]


@pytest.mark.parametrize("zeta_outside", [-1, 4, 100])
def test_a_zeta_outside_the_run_is_refused(zeta_outside):
    with pytest.raises(ValueError, match=rf"round {zeta_outside} is outside 0 \.\.\. 2"):
        zeta_at(zeta_outside, 3)


def test_a_schedule_ends_at_its_floor():
    """The value after the last round, which server feedback uses."""
    for schedule in ("cosine", "linear"):
        assert zeta_at(7, 7, schedule=schedule, zeta=0.9, floor=0.25) == pytest.approx(0.25)
    assert zeta_at(7, 7, zeta=0.9, floor=0.25) == 0.9


@pytest.mark.parametrize("round", [-1, 3, 100])
def test_a_learning_rate_outside_the_run_is_refused(round):
    with pytest.raises(ValueError, match=rf"round {round} is outside 0 \.\.\. 2"):
        learning_rate_at(round, 3, 0.1)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_a_run_without_rounds_has_no_schedule(schedule):
    with pytest.raises(ValueError, match="outside"):
        zeta_at(0, 0, schedule=schedule)


def test_an_unknown_schedule_is_refused_with_those_that_exist():
    with pytest.raises(ValueError, match="'exponential'; it is one of constant, cosine, linear"):
        zeta_at(0, 3, schedule="exponential")  # type: ignore[arg-type]
