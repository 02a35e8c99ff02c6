"""Batches that a thread makes while the device computes."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")
Part = TypeVar("Part")
# The parts of a batch, each with its share of the batch's mean loss.
Parts = list[tuple[Part, float]]

_AHEAD = 2  # items that are made before they are wanted


@contextmanager
def prefetched(batches: Iterable[Parts[Part]], device: torch.device) -> Iterator[Iterable[Parts[Part]]]:
    """The same batches in the same order, made ahead for a loop on ``device``.

    On the CPU they are made when they are wanted. For an accelerator a thread makes them ahead. For CUDA it
    also moves them to page-locked (pinned) memory, from which a copy to the GPU does not wait.

    One thread makes all batches, so the random draws of a data set keep their order. They come from the
    CPU's generator, and dropout on an accelerator draws from the accelerator's own.

    Args:
        batches: the parts of each batch; the thread iterates over them.
        device: the device of the loop.
    """
    if device.type == "cpu":
        yield batches
        return
    if device.type == "cuda":
        batches = _pinned(batches, torch.cuda.current_device() if device.index is None else device.index)
    with made_ahead(batches) as ready:
        yield ready


@contextmanager
def made_ahead(items: Iterable[Item], ahead: int = _AHEAD) -> Iterator[Iterator[Item]]:
    """Iterate over ``items`` in a thread, which makes up to ``ahead`` of them before they are wanted.

    An error of the thread is raised where the item that failed is wanted. The thread ends with the context,
    even if not all items were wanted.
    """
    thread = _Thread(items, ahead)
    try:
        yield thread.made()
    finally:
        thread.end()


def _pinned(batches: Iterable[Parts[Part]], gpu: int) -> Iterator[Parts[Part]]:
    """The batches in page-locked memory. The current GPU belongs to a thread, so it is set in this one."""
    torch.cuda.set_device(gpu)
    for parts in batches:
        yield [(_pin(part), share) for part, share in parts]


def _pin(part: Part) -> Part:
    """A dictionary with its tensors of the CPU in page-locked memory; anything else is returned as it is."""
    if not isinstance(part, dict):
        return part
    return type(part)(
        (name, value.pin_memory() if value.device.type == "cpu" else value) for name, value in part.items()
    )


class _Thread(Generic[Item]):
    def __init__(self, items: Iterable[Item], ahead: int) -> None:
        self._items = items
        self._room = threading.Semaphore(ahead)
        self._stopped = False
        # An item in a tuple, an error, or None at the end.
        self._found: SimpleQueue[tuple[Item] | BaseException | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._make, name="fedsmoothlora-batches", daemon=True)
        self._thread.start()

    def made(self) -> Iterator[Item]:
        while (found := self._found.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            self._room.release()
            yield found[0]

    def end(self) -> None:
        self._stopped = True
        self._room.release()
        self._thread.join()

    def _make(self) -> None:
        try:
            items = iter(self._items)
            while True:
                self._room.acquire()
                if self._stopped:
                    return
                try:
                    item = next(items)
                except StopIteration:
                    break
                self._found.put((item,))
            self._found.put(None)
        except BaseException as error:  # also an interrupt, so that the loop does not wait for ever
            self._found.put(error)
