"""One method of each family, for properties of a family: `make test` tests these, `make test-release` all."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

# The server averages: one factor at a time, both factors, products, stacked factors, nothing, whole weights.
OF_A_FAMILY = ("rolora", "fedit", "fedsmoothlora", "flora", "local", "full")


# With these options, the bytes of a round do not depend on the values of its uploads.
PREDICTABLE: dict[str, dict[str, Any]] = {"florist": {"method.energy": 1.0}}


def by_family(methods: Iterable[str], fast: Collection[str] = OF_A_FAMILY) -> list[Any]:
    """The methods as parameters of a test; those that are not in ``fast`` are marked ``release``."""
    return [pytest.param(name, marks=level(name, fast)) for name in methods]


def level(
    method: str, fast: Collection[str] = OF_A_FAMILY, slow: Collection[str] = ()
) -> list[pytest.MarkDecorator]:
    """The marks of a test of a method: none, ``slow``, or ``release`` for a method in neither list."""
    if method in fast:
        return []
    return [pytest.mark.slow if method in slow else pytest.mark.release]
