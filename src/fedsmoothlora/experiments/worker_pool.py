"""Planned runs in processes of their own, several at a time."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from fedsmoothlora.errors import InterruptedRunError
from fedsmoothlora.experiments.display import Display
from fedsmoothlora.experiments.planned_runs import PlannedRun, to_message, write_outcome

_WORKER = [sys.executable, "-m", "fedsmoothlora.experiments.worker"]


def carry_out_in_processes(waiting: Sequence[PlannedRun], jobs: int, display: Display) -> None:
    """Carry out planned runs in up to ``jobs`` processes.

    One thread for each process sends it one planned run after another and shows the events.

    Raises ``InterruptedRunError`` on Ctrl-C.
    """
    left: queue.SimpleQueue[PlannedRun] = queue.SimpleQueue()
    for planned_run in waiting:
        left.put(planned_run)
    pool = WorkerPool()
    threads = [
        threading.Thread(target=_work, args=(left, pool, display), daemon=True)
        for _ in range(min(jobs, len(waiting)))
    ]
    with _interrupting(pool, display):
        for thread in threads:
            thread.start()
        for thread in threads:
            # Python handles signals between two calls of join.
            while thread.is_alive():
                thread.join(timeout=0.2)
    if pool.errors:
        raise pool.errors[0]
    if pool.stopped:
        raise InterruptedRunError("stopped by Ctrl-C")


class Worker:
    """A process that carries out one planned run after another, `fedsmoothlora.experiments.worker`."""

    def __init__(self) -> None:
        # A file: a pipe that is not read would fill up and block the process.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self.process = subprocess.Popen(
            _WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            # The terminal's Ctrl-C does not reach this process; the pool sends the signal once.
            start_new_session=True,
        )

    def events(self, planned_run: PlannedRun) -> Iterator[dict[str, Any]]:
        """Send a planned run to the process and yield the events that it reports until the run ends."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(to_message(planned_run) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            event: dict[str, Any] = json.loads(line)
            yield event
            if "state" in event:
                break

    def exit_message(self) -> str:
        """The exit code and the last line of the process's error output."""
        code = self.process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", errors="replace").strip().splitlines()
        return f"its process ended with code {code}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        """End the process once it is idle."""
        with suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._errors.close()


class WorkerPool:
    """The worker processes, and whether they were told to stop."""

    def __init__(self) -> None:
        self.stopped = False
        self.errors: list[Exception] = []
        # Reentrant: a second Ctrl-C may arrive while the first is handled.
        self._lock = threading.RLock()
        self._workers: list[Worker] = []

    def start(self) -> Worker | None:
        """Start a process; None after the pool was stopped."""
        with self._lock:
            if self.stopped:
                return None
            self._workers.append(Worker())
            return self._workers[-1]

    def signal(self, number: int) -> None:
        """Send a signal to all processes; no further process is started."""
        with self._lock:
            self.stopped = True
            for worker in self._workers:
                if worker.process.poll() is None:
                    worker.process.send_signal(number)


def _work(left: queue.SimpleQueue[PlannedRun], pool: WorkerPool, display: Display) -> None:
    worker: Worker | None = None
    try:
        while not pool.stopped:
            planned_run = left.get_nowait()
            worker = worker or pool.start()
            if worker is None:
                break
            if not _hand_over(planned_run, worker, pool, display):
                worker.close()
                worker = None
    except queue.Empty:
        pass
    except Exception as error:  # raised again in the main thread
        pool.errors.append(error)
    if worker is not None:
        worker.close()


def _hand_over(planned_run: PlannedRun, worker: Worker, pool: WorkerPool, display: Display) -> bool:
    """Let a process carry out a run and show its events; return whether the process can take another run.

    If the process dies, only this run fails.
    """
    with display.planned_run(planned_run) as callback:
        for event in worker.events(planned_run):
            if "state" not in event:
                callback.received(event)
            elif event["state"] == "interrupted":
                return False
            else:
                callback.ended(event["state"], planned_run.outcome())
                return True
        reason = worker.exit_message()
        if not pool.stopped:
            write_outcome(planned_run, "failed", reason)
            callback.ended("failed", planned_run.outcome())
        return False


@contextmanager
def _interrupting(pool: WorkerPool, display: Display) -> Iterator[None]:
    """Forward Ctrl-C and SIGTERM to the processes.

    They stop after the current client, or at once on the second signal. A scheduler that ends a job sends
    SIGTERM; without this, processes would go on unseen.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if pool.stopped:
            pool.signal(signal.SIGTERM)
            raise KeyboardInterrupt
        display.say("stopping after the current clients; press Ctrl-C again to stop at once")
        pool.signal(signal.SIGINT)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
