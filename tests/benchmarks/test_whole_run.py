"""Times of nested parts: nothing is counted twice, and nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import whole_run
from benchmarks.whole_run import _PARTS, OwnTimes

# A part's name, the ticks before its inner parts, and these.
_TREES = st.recursive(
    st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.just(())),
    lambda inner: st.tuples(
        st.sampled_from("abc"), st.integers(0, 5), st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=12,
)


@given(_TREES)
def test_every_tick_belongs_to_the_innermost_part(tree: tuple[str, int, tuple[object, ...]]) -> None:
    clock, expected = 0, dict.fromkeys("abc", 0)
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(whole_run.time, "perf_counter", lambda: clock)
        times = OwnTimes()

        def run(name: str, ticks: int, inner: tuple[tuple[str, int, tuple[object, ...]], ...]) -> None:
            nonlocal clock
            clock += ticks
            expected[name] += ticks
            for one in inner:
                times.around(one[0], run)(*one)

        with times.part(tree[0]):
            run(*tree)  # type: ignore[arg-type]
    assert {name: times.seconds.get(name, 0) for name in "abc"} == expected


def test_a_part_that_fails_is_closed() -> None:
    times = OwnTimes()
    with times.part("outer"):
        with pytest.raises(ValueError, match="inner"), times.part("inner"):
            raise ValueError("inner")
        assert times._open == ["outer"]


def test_every_part_exists() -> None:
    for functions in _PARTS.values():
        for owner, name in functions:
            assert callable(getattr(owner, name))


def test_the_parts_add_up_to_the_rounds() -> None:
    found = {name: float(2**k) for k, name in enumerate([*_PARTS, whole_run._REST])}
    rows = {row.name.partition(": ")[2]: row for row in whole_run.rows_of(found, sum(found.values()))}
    assert rows["the sum of the parts"].ratio == 1.0
    assert {name: rows[name].value for name in found} == found
    counted = "all but evaluation and files, against forward and backward alone"
    assert rows[counted].value + rows["evaluation and files"].value == sum(found.values())


def test_a_part_outside_of_all_others_is_not_counted() -> None:
    times = OwnTimes()
    assert times.around("a", lambda: 3)() == 3
    assert times.seconds == {}
