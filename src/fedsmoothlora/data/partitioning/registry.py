"""The partitions by name: one class in each file of this folder."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from inspect import isabstract

from fedsmoothlora.data.partitioning.base import Partitioning


@cache
def _by_name() -> Mapping[str, type[Partitioning]]:
    package = __name__.rpartition(".")[0]
    modules = [
        import_module(f"{package}.{found.name}")
        for found in pkgutil.iter_modules(import_module(package).__path__)
    ]
    classes = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Partitioning) and not isabstract(value)
    ]
    named = {str(vars(kind)["kind"]): kind for kind in classes}
    return dict(sorted(named.items()))


def names() -> tuple[str, ...]:
    """The partitions there are, alphabetically."""
    return tuple(_by_name())


def find(name: str) -> type[Partitioning]:
    """The class of a partition.

    Raises ``ValueError`` that lists the partitions there are.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"unknown partition {name!r}{hint} There are: {', '.join(names())}")
    return _by_name()[name]
