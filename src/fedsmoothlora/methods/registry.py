"""The methods by name: those of this folder, and those of other packages.

Each module of this folder defines one method, whose name is that of the module; there is no other list. Other
packages declare their methods as entry points:

.. code-block:: toml

    [project.entry-points."fedsmoothlora.methods"]
    mymethod = "mypackage.mymodule:MyMethod"
"""

from __future__ import annotations

import difflib
import pkgutil
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import get_args

from fedsmoothlora.errors import MethodError
from fedsmoothlora.methods.base import Family, Method

GROUP = "fedsmoothlora.methods"

# Modules of this folder that do not define methods.
_INTERFACE = ("base", "registry")


def names() -> tuple[str, ...]:
    """Names of all methods, sorted.

    Raises ``MethodError`` if a package declares a method with the name of another one.
    """
    return tuple(sorted({*_built_in(), *_installed()}))


def by_family() -> tuple[str, ...]:
    """Names of all methods, grouped by `Method.family`, and sorted in each family."""
    families = (*get_args(Family), "")
    return tuple(sorted(names(), key=lambda name: (families.index(find(name).family), name)))


def find(name: str) -> type[Method]:
    """The class of a method.

    Raises ``MethodError`` if there is no such method, with a list of all, or if a package's method is wrong.
    """
    if name not in names():
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise MethodError(f"unknown method {name!r}{hint} There are: {', '.join(names())}")
    return _class_in(name) if name in _built_in() else _loaded(_installed()[name])


def with_trait(trait: str) -> list[str]:
    """Names of the methods for which this field of `Traits` is true, for errors that list alternatives."""
    return [name for name in names() if getattr(find(name).traits, trait)]


def check_own(method: Method) -> None:
    """Raise ``MethodError`` if the user's own ``method`` has no name, or the name of another method."""
    kind = type(method)
    if not method.name:
        raise MethodError(f'{kind.__name__} has no name; give the class one: name: ClassVar[str] = "..."')
    if method.name in names() and find(method.name) is not kind:
        raise MethodError(
            f"{kind.__name__} has the name of another method, {method.name!r}; give it a name of its own"
        )


@cache
def _built_in() -> tuple[str, ...]:
    found = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return tuple(name for name in found if name not in _INTERFACE)


@cache
def _installed() -> dict[str, EntryPoint]:
    """Entry points of other packages, by name."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name in _built_in():
            raise MethodError(f"{_origin(entry)}: method {entry.name!r} has the name of a built-in method")
        other = found.setdefault(entry.name, entry)
        if other != entry:
            raise MethodError(f"{_origin(entry)}: method {entry.name!r} is declared by {_origin(other)} too")
    return found


def _class_in(name: str) -> type[Method]:
    """The class of a built-in method."""
    module = import_module(f"{__package__}.{name}")
    return next(
        one
        for one in vars(module).values()
        if isinstance(one, type) and issubclass(one, Method) and one.name == name
    )


def _loaded(entry: EntryPoint) -> type[Method]:
    try:
        found = entry.load()
    except Exception as error:  # the import of another package may raise any error
        raise MethodError(
            f"{_origin(entry)}: method {entry.name!r} ({entry.value}) cannot be imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise MethodError(
            f"{_origin(entry)}: method {entry.name!r} ({entry.value}) is not a subclass of "
            "fedsmoothlora.methods.Method"
        )
    if found.name != entry.name:
        raise MethodError(
            f"{_origin(entry)}: the entry point {entry.name!r} ({entry.value}) must have the name of its "
            f"method, {found.name!r}"
        )
    return found


def _origin(entry: EntryPoint) -> str:
    """The distribution that declares an entry point."""
    return f"package {entry.dist.name}" if entry.dist is not None else f"entry point {entry.value}"
