"""Checks of the arguments of partition functions."""

from __future__ import annotations

from math import isfinite
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.errors import ConfigError


def as_integers(labels: NDArray[Any]) -> NDArray[np.int64]:
    """The labels as int64. Raises ``ConfigError`` unless they are a 1-D array of integers."""
    found = np.asarray(labels)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ConfigError(f"labels must be a 1-D array of integers, not {found.ndim}-D of {found.dtype}")
    return found.astype(np.int64)


def check_whole(name: str, value: int, least: int = 1) -> None:
    """Raise ``ConfigError`` unless ``value`` is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")


def check_positive(name: str, value: float) -> None:
    """Raise ``ConfigError`` unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value) or value <= 0:
        raise ConfigError(f"{name}={value!r} must be a finite number above 0")
