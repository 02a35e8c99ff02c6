"""Packaged models and data sets, ``pkg:NAME``, whose files PyPI packages contain."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import ModuleType

from fedsmoothlora.errors import ConfigError

PREFIX = "pkg:"


@cache
def packaged(folder: str) -> Mapping[str, ModuleType]:
    """The modules of a ``packaged`` folder, by the name that configurations use.

    Args:
        folder: the module name of the folder, for instance ``fedsmoothlora.modeling.packaged``.
    """
    found = pkgutil.iter_modules(import_module(folder).__path__)
    modules = [import_module(f"{folder}.{module.name}") for module in found]
    return {module.NAME: module for module in sorted(modules, key=lambda module: str(module.NAME))}


def find_packaged(source: str, folder: str) -> ModuleType:
    """The module of ``pkg:NAME``.

    Raises ``ConfigError``, which lists all names, if there is no such module.
    """
    name, known = source.removeprefix(PREFIX), packaged(folder)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean '{PREFIX}{close[0]}'?" if close else "."
        raise ConfigError(
            f"unknown source {source!r}{hint} There are: {', '.join(PREFIX + n for n in known)}"
        )
    return known[name]
