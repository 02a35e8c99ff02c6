"""Numbers of a table or a headline, from series of values by round."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

from fedsmoothlora.reports import formats
from fedsmoothlora.reports.blocks import Number
from fedsmoothlora.reports.reading import Series


def measured(value: float, form: Callable[[float], str] = formats.number, note: str = "") -> Number:
    """A number of a table or a headline, with a remark behind it."""
    return Number(value, form(value), note)


def cell(value: float | None, name: str, note: str = "") -> Number | None:
    """The value of a metric in a table; None if it was not measured."""
    return None if value is None else measured(value, formats.form_of(name), note)


def last_value(series: Series) -> float | None:
    """The value of the last round; None for a series without any."""
    return series[max(series)] if series else None


def finite_sum(series: Series | None) -> float | None:
    """The sum of the finite values; None if there are none."""
    finite = [value for value in (series or {}).values() if math.isfinite(value)]
    return sum(finite) if finite else None


def cumulative(series: Series) -> dict[int, float]:
    """The sum up to each round; a value that is not finite counts as 0."""
    rounds = sorted(series)
    values = (series[round] if math.isfinite(series[round]) else 0.0 for round in rounds)
    return dict(zip(rounds, accumulate(values), strict=True))


def in_words(words: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""
