"""The entries of `fedsmoothlora list`: recipes, models, data sets, methods, partitions."""

from __future__ import annotations

from collections.abc import Sequence

from fedsmoothlora import config, methods
from fedsmoothlora.data import partitioning, registry

_PACKAGED_MODELS = "fedsmoothlora.modeling.packaged"
_PACKAGED_DATA = "fedsmoothlora.data.packaged"

Rows = Sequence[tuple[str, ...]]


def entries(kind: str) -> tuple[Sequence[str], Rows]:
    """Column titles and rows of one kind of entries.

    Raises ``ValueError`` for an unknown kind.
    """
    if kind == "recipes":
        return ("recipe", "description"), list(config.recipes().items())
    if kind == "models":
        return _packaged(_PACKAGED_MODELS)
    if kind == "datasets":
        return _packaged(_PACKAGED_DATA)
    if kind == "methods":
        rows = [(name, methods.find(name).summary()) for name in methods.by_family()]
        return ("method", "description"), rows
    if kind == "partitions":
        rows = [(name, _first_line(partitioning.find(name).__doc__)) for name in partitioning.names()]
        return ("partition", "description"), rows
    raise ValueError(f"unknown kind {kind!r}")


def group_of(kind: str, name: str) -> str:
    """The group in which an entry is listed: a method's family; empty for other kinds."""
    return (methods.find(name).family or "other") if kind == "methods" else ""


def _packaged(folder: str) -> tuple[Sequence[str], Rows]:
    rows = [
        (registry.PREFIX + name, module.LICENCE, f"{module.PACKAGE.requirement}", module.DESCRIPTION)
        for name, module in registry.packaged(folder).items()
    ]
    return ("source", "licence", "package", "description"), rows


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().splitlines()[0]
