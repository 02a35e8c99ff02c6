"""The tasks by name: one class in each file of this folder."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from inspect import isabstract

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.tasks.base import Task


@cache
def _by_name() -> Mapping[str, type[Task]]:
    package = __name__.rpartition(".")[0]
    modules = [
        import_module(f"{package}.{found.name}")
        for found in pkgutil.iter_modules(import_module(package).__path__)
        if not found.ispkg  # objectives and metrics import torch
    ]
    classes = [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and not isabstract(value)
    ]
    named = {str(vars(task)["kind"]): task for task in classes}
    return dict(sorted(named.items()))


def names() -> tuple[str, ...]:
    """The tasks there are, alphabetically."""
    return tuple(_by_name())


def find(name: str) -> type[Task]:
    """The class of a task.

    Raises ``ConfigError`` that lists the tasks there are.
    """
    if name not in names():
        close = difflib.get_close_matches(str(name), names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ConfigError(f"unknown task {name!r}{hint} There are: {', '.join(names())}")
    return _by_name()[name]


def with_hub_name(name: str) -> type[Task]:
    """The class of the task that the Hugging Face hub calls ``name``."""
    return next(task for task in _by_name().values() if task.hub_name == name)
