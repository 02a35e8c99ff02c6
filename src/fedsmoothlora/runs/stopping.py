"""Ctrl-C and SIGTERM end a run between two clients, so that no client's work is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from fedsmoothlora.callbacks import Callback

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping(callback: Callback) -> Iterator[Callable[[], bool]]:
    """Handle signals that ask the run to stop; the block receives a function that says whether one came.

    After the first signal, the run ends when the clients that are training have finished. A second one ends
    it at once. Outside the main thread, Python delivers no signals, and nothing is handled.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        callback.on_note("stopping after the clients in hand; press Ctrl-C again to stop at once")

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
