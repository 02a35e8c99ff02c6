"""Progress without a terminal: a line whenever nothing was printed for a while."""

from __future__ import annotations

import contextvars
import logging
import threading
import time

from rich.console import Console

from fedsmoothlora.callbacks import Callback, RunInfo
from fedsmoothlora.federation.records import RoundRecord

_MOST_SHOWN = 4  # clients in a line

_log = logging.getLogger("fedsmoothlora.run")


class ProgressLines(Callback):
    """Prints how far a round is, for logs of batch jobs.

    A thread prints the lines, so that long steps, calibrations and evaluations are covered too.

    Args:
        console: the console.
        every: seconds without any other output after which a line is printed.
    """

    def __init__(self, console: Console, every: float = 30.0) -> None:
        self._console = console
        self._every = every
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._last = 0.0
        self._steps: dict[str, tuple[int, int]] = {}
        self._training: dict[str, str] = {}
        self._stage_begins("before round 1", clients=0)

    def line(self) -> str:
        """The progress: ``round 3/10, 95 s: 1 of 4 clients; client b: step 8 of 20, loss 0.4213``."""
        shown = [f"{self._done} of {self._clients} clients"] if self._clients else []
        shown += list(self._training.values())[:_MOST_SHOWN]
        line = f"{self._stage}, {time.monotonic() - self._began:.0f} s"
        return f"{line}: {'; '.join(shown)}" if shown else line

    def on_run_begin(self, run: RunInfo) -> None:
        """Start the thread."""
        self._last = time.monotonic()
        # In the context of the run, so that its log file receives the lines.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._watch,), daemon=True)
        self._thread.start()

    def on_run_end(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def on_round_begin(self, round: int, rounds: int, clients: int) -> None:
        """Describe the round from now on."""
        self._stage_begins(f"round {round + 1}/{rounds}", clients)

    def on_client_begin(self, client: str, steps: int) -> None:
        """Describe the client from now on."""
        self._steps[client] = 0, steps
        self._describe(client, f"client {client}: starting")

    def on_client_step(self, client: str, loss: float) -> None:
        """Count the step."""
        done, steps = self._steps[client]
        self._steps[client] = done + 1, steps
        self._describe(client, f"client {client}: step {done + 1} of {steps}, loss {loss:.4f}")

    def on_client_end(self, client: str) -> None:
        """Count the client."""
        self._done += 1
        self._training = {name: text for name, text in self._training.items() if name != client}

    def on_note(self, text: str) -> None:
        """Wait again: a sentence was printed."""
        self._last = time.monotonic()

    def on_round_end(self, record: RoundRecord) -> None:
        """Wait again: a line about the round was printed."""
        self._last = time.monotonic()
        self._stage_begins(f"after round {record.round}", clients=0)

    def _stage_begins(self, stage: str, clients: int) -> None:
        self._stage, self._clients, self._done = stage, clients, 0
        self._began = time.monotonic()
        self._steps, self._training = {}, {}

    def _describe(self, client: str, text: str) -> None:
        # Never changed in place: the thread may be reading it.
        self._training = {**self._training, client: text}

    def _watch(self) -> None:
        while not self._stopped.wait(max(0.0, self._last + self._every - time.monotonic())):
            if time.monotonic() - self._last >= self._every:
                self._last = time.monotonic()
                line = self.line()
                _log.info(line)
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)
