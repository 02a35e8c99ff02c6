"""Means over seeds, and confidence intervals of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95
NOT_ALL_SEEDS = "not all seeds"


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (``n - 1``) of ``n`` values; NaN if there are too few."""

    mean: float
    std: float
    n: int


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences with its 95 % confidence interval, ``low`` to ``high``.

    With a single pair there is no interval, and both are NaN.
    """

    mean: float
    low: float
    high: float
    n: int

    def verdict(self, *, larger_is_better: bool, seeds: int = 0) -> str:
        """``better``, ``worse`` or ``no difference seen`` (the interval holds 0), or why there is no verdict.

        Args:
            larger_is_better: whether a positive difference is an advantage.
            seeds: the number of pairs that there should be. With fewer, the verdict is ``not all seeds``,
                because the seeds that are left would favour a method that diverges.

        Without an interval it is ``one seed only`` or ``no pair``.
        """
        if 0 < self.n < seeds:
            return NOT_ALL_SEEDS
        if self.n < 2:
            return "one seed only" if self.n else "no pair"
        if self.low <= 0 <= self.high:
            return "no difference seen"
        return "better" if (self.mean > 0) == larger_is_better else "worse"


def summary(values: Sequence[float]) -> Summary:
    """Mean and standard deviation of the values."""
    n = len(values)
    return Summary(fmean(values) if n else math.nan, stdev(values) if n > 1 else math.nan, n)


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """``mean(d) -+ t sd(d) / sqrt(n)`` of the differences ``d``, pair by pair.

    ``t`` is the 97.5 % quantile of Student's distribution with ``n - 1`` degrees of freedom. The values of a
    pair share the seed, so effects of the seed on both cancel.

    Raises ``ValueError`` if the numbers of values and of baselines differ.
    """
    from scipy import stats  # imported here because it takes a while to load

    found = summary([value - base for value, base in zip(values, baseline, strict=True)])
    if found.n < 2:
        return Difference(found.mean, math.nan, math.nan, found.n)
    # From the quantile: scipy.stats.ttest_rel has no interval where all differences are equal.
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, found.n - 1))
    half = quantile * found.std / math.sqrt(found.n)
    return Difference(found.mean, found.mean - half, found.mean + half, found.n)
