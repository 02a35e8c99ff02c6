"""Means over seeds, and what they say of a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (``n - 1``) of ``n`` values; NaN where there are too few."""

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

    def verdict(self, *, larger_is_better: bool) -> str:
        """``better``, ``worse``, ``no difference seen`` (the interval holds 0) or ``one seed only``."""
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
    pair have the seed in common: what the seed does to both drops out.

    Raises ``ValueError`` if there are not as many values as baselines.
    """
    found = summary([value - base for value, base in zip(values, baseline, strict=True)])
    if found.n < 2:
        return Difference(found.mean, math.nan, math.nan, found.n)
    half = t_quantile((1 + CONFIDENCE) / 2, found.n - 1) * found.std / math.sqrt(found.n)
    return Difference(found.mean, found.mean - half, found.mean + half, found.n)


def t_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t with that many degrees of freedom stays below with this probability.

    By bisection of the exact distribution. Raises ``ValueError`` if it is not within (0, 1), or ``degrees``
    is below 1.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"probability {probability} must be within (0, 1), degrees {degrees} at least 1")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while t_distribution(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_distribution(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def t_distribution(t: float, degrees: int) -> float:
    """``P(T <= t)`` of Student's t with ``degrees`` = 1, 2, ... degrees of freedom.

    A finite sum in ``theta = arctan(t / sqrt(degrees))`` (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    theta = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(theta)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(odd + 1, degrees, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    inner = math.sin(theta) * total
    central = 2 / math.pi * (theta + inner) if odd else inner
    return 0.5 + central / 2
