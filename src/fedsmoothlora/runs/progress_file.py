"""Progress within a round as a file of the run's folder, for ``fedsmoothlora watch``."""

from __future__ import annotations

import math
import threading
import time
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from fedsmoothlora.callbacks import Callback, RunInfo
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.storage.progress import MOST_IN_HAND, ClientInHand, Progress, write_progress


class ProgressFile(Callback):
    """Keeps ``progress.json`` while the run goes on, and removes it at the end.

    A thread writes the file, so that its age shows whether the run is alive, also in a long evaluation.
    If the file cannot be written, the run goes on without it.

    Args:
        path: the file.
        private: leave out who trains and how many, since a private run draws its clients in secret.
        every: seconds between two writes.
    """

    def __init__(self, path: Path, *, private: bool = False, every: float = 1.0) -> None:
        self._path = path
        self._private = private
        self._every = every
        # Never changed in place: the thread may be reading it.
        self._progress = Progress(written=0, rounds=0)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def on_run_begin(self, run: RunInfo) -> None:
        self._progress = Progress(written=0, rounds=run.rounds)
        self.write()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def on_round_begin(self, round: int, rounds: int, clients: int) -> None:
        self._progress = Progress(
            written=0, rounds=rounds, round=round + 1, clients=None if self._private else clients
        )

    def on_client_begin(self, client: str, steps: int) -> None:
        self._describe(client, ClientInHand(step=0, steps=steps))

    def on_client_step(self, client: str, loss: float) -> None:
        if (known := self._progress.in_hand.get(client)) is not None:
            shown = loss if math.isfinite(loss) else None
            self._describe(client, ClientInHand(step=known.step + 1, steps=known.steps, loss=shown))

    def on_client_end(self, client: str) -> None:
        if not self._private:
            now = self._progress
            left = {name: one for name, one in now.in_hand.items() if name != client}
            self._progress = replace(now, done=now.done + 1, in_hand=left)

    def on_round_end(self, record: RoundRecord) -> None:
        self._progress = Progress(written=0, rounds=self._progress.rounds)

    def on_run_end(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def write(self) -> None:
        """Write the file as of now."""
        now = self._progress
        named = dict(islice(now.in_hand.items(), MOST_IN_HAND))
        with suppress(OSError):
            write_progress(
                self._path, replace(now, written=time.time(), training=len(now.in_hand), in_hand=named)
            )

    def _describe(self, client: str, one: ClientInHand) -> None:
        if not self._private:
            self._progress = replace(self._progress, in_hand={**self._progress.in_hand, client: one})

    def _keep(self) -> None:
        while not self._stopped.wait(self._every):
            self.write()
