"""Layers whose decompositions are computed together, in one stack for each shape.

On an accelerator, a decomposition of a small matrix takes as long as its launches, and every value that is
read waits for the device. There, layers of one shape are stacked. On the CPU, one layer after another is as
fast or faster, because a stack is a copy that leaves the cache (docs/performance.md), and results there stay
the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

import torch

# Devices whose layers are stacked.
STACKING = frozenset({"cuda"})
# The most numbers in a stack: 512 MB in float32.
_NUMBERS = 2**27

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_stacks(
    items: Sequence[Item],
    alike: Callable[[Item], Hashable],
    numbers: Callable[[Item], int],
    together: Callable[[Sequence[Item]], Sequence[Result]],
) -> list[Result]:
    """The result of every item, computed together with the items that are alike.

    Args:
        items: the items.
        alike: equal for items that may be stacked.
        numbers: how many numbers an item adds to a stack.
        together: the results of items that are alike.
    """
    found: dict[int, Result] = {}
    for places in _stacks(items, alike, numbers):
        found |= zip(places, together([items[place] for place in places]), strict=True)
    return [found[place] for place in range(len(items))]


def _stacks(
    items: Sequence[Item], alike: Callable[[Item], Hashable], numbers: Callable[[Item], int]
) -> Iterator[list[int]]:
    """Places of items that are alike, with at most `_NUMBERS` numbers, but at least one item."""
    groups: dict[Hashable, list[int]] = {}
    for place, item in enumerate(items):
        groups.setdefault(alike(item), []).append(place)
    for places in groups.values():
        size = max(1, _NUMBERS // max(1, numbers(items[places[0]])))
        for first in range(0, len(places), size):
            yield places[first : first + size]


def stacks_on(device: torch.device) -> bool:
    """Whether layers are stacked on this device."""
    return device.type in STACKING
