"""Progress within a round as a file of the run's folder, for ``fedsmoothlora watch``."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

from fedsmoothlora.callbacks import Callback, RunInfo
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.storage.progress import MOST_IN_HAND, ClientInHand, Progress, write_progress


class ProgressFile(Callback):
    """Keeps ``progress.json`` while the run goes on, and removes it at the end.

    A file that cannot be written is left as it is: the run goes on.

    Args:
        path: the file.
        private: leave out who trains and how many, since a private run draws its clients in secret.
        every: the file is written at most once in so many seconds within a round.
    """

    def __init__(self, path: Path, *, private: bool = False, every: float = 1.0) -> None:
        self._path = path
        self._private = private
        self._every = every
        self._rounds = 0
        self._round: int | None = None
        self._clients = self._done = 0
        self._in_hand: dict[str, tuple[int, int, float]] = {}
        self._next = -math.inf

    def on_run_begin(self, run: RunInfo) -> None:
        self._rounds = run.rounds
        self._between_rounds()

    def on_round_begin(self, round: int, rounds: int, clients: int) -> None:
        self._round, self._clients, self._done = round + 1, clients, 0
        self._in_hand = {}
        self._write()

    def on_client_begin(self, client: str, steps: int) -> None:
        self._in_hand[client] = 0, steps, math.nan
        self._write_now_and_then()

    def on_client_step(self, client: str, loss: float) -> None:
        done, steps, _ = self._in_hand.get(client, (0, 0, math.nan))
        self._in_hand[client] = done + 1, steps, loss
        self._write_now_and_then()

    def on_client_end(self, client: str) -> None:
        self._done += 1
        self._in_hand.pop(client, None)
        self._write_now_and_then()

    def on_round_end(self, record: RoundRecord) -> None:
        self._between_rounds()

    def on_run_end(self) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _between_rounds(self) -> None:
        self._round, self._in_hand = None, {}
        self._write()

    def _write_now_and_then(self) -> None:
        if not self._private and time.monotonic() >= self._next:
            self._write()

    def _write(self) -> None:
        self._next = time.monotonic() + self._every
        with suppress(OSError):
            write_progress(self._path, self._progress())

    def _progress(self) -> Progress:
        written, rounds = time.time(), self._rounds
        if self._private or self._round is None:
            return Progress(written=written, rounds=rounds, round=self._round)
        return Progress(
            written=written,
            rounds=rounds,
            round=self._round,
            clients=self._clients,
            done=self._done,
            training=len(self._in_hand),
            in_hand={
                client: ClientInHand(step=step, steps=steps, loss=loss if math.isfinite(loss) else None)
                for client, (step, steps, loss) in islice(self._in_hand.items(), MOST_IN_HAND)
            },
        )
