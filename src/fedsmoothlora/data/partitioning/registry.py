"""The partitions by name: one class in each file of this folder."""

from __future__ import annotations

from fedsmoothlora.data.partitioning.base import Partitioning
from fedsmoothlora.plugins import PluginFolder

_FOLDER: PluginFolder[Partitioning] = PluginFolder(
    "fedsmoothlora.data.partitioning",
    Partitioning,  # type: ignore[type-abstract]
    "partition",
)


def names() -> tuple[str, ...]:
    """Names of all partitions, sorted."""
    return tuple(_FOLDER.by_name)


def find(name: str) -> type[Partitioning]:
    """The class of a partition.

    Raises ``ConfigError``, which lists all partitions, if there is none of this name.
    """
    return _FOLDER.find(name)
