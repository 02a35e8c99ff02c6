"""Built-in plug-ins: the classes in the files of a folder, by the name that configurations use."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from inspect import isabstract
from typing import Generic, TypeVar

from fedsmoothlora.errors import ConfigError

Plugin = TypeVar("Plugin")


class PluginFolder(Generic[Plugin]):
    """The plug-ins of a folder. A file in it is a plug-in; nothing else lists it.

    Args:
        package: the folder's module name; its own subfolders are left out.
        base: the base class; every plug-in is a subclass with a ``kind`` of its own.
        what: the plug-in's name in error messages, such as ``partition``.
    """

    def __init__(self, package: str, base: type[Plugin], what: str) -> None:
        self._package, self._base, self._what = package, base, what

    @cached_property
    def by_name(self) -> Mapping[str, type[Plugin]]:
        """The classes by name, alphabetically."""
        modules = [
            import_module(f"{self._package}.{found.name}")
            for found in pkgutil.iter_modules(import_module(self._package).__path__)
            if not found.ispkg
        ]
        classes = [
            value
            for module in modules
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, self._base) and not isabstract(value)
        ]
        named = {str(vars(plugin)["kind"]): plugin for plugin in classes}
        return dict(sorted(named.items()))

    def find(self, name: str) -> type[Plugin]:
        """The class of that name.

        Raises ``ConfigError`` that lists the names.
        """
        names = tuple(self.by_name)
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ConfigError(f"unknown {self._what} {name!r}{hint} There are: {', '.join(names)}")
        return self.by_name[name]
