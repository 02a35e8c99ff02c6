"""The partitions, each one class in one file of this folder."""

from fedsmoothlora.data.partitioning.base import Partitioning, Rows
from fedsmoothlora.data.partitioning.registry import find, names

__all__ = ["Partitioning", "Rows", "find", "names"]
