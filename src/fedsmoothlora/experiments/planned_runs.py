"""The planned runs of a comparison: their state, and carrying out those that are not finished."""

from __future__ import annotations

import json
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from rich.console import Console

from fedsmoothlora.config import Config, ConfigError, first_difference, read, to_toml
from fedsmoothlora.errors import FederationStoppedError, InterruptedRunError
from fedsmoothlora.experiments.display import Display, PlannedRunCallback
from fedsmoothlora.federation.engines.processes import processors, too_many_threads
from fedsmoothlora.federation.settings import MachineSettings
from fedsmoothlora.runs.session import run
from fedsmoothlora.storage.files import write_text

_WORKER = [sys.executable, "-m", "fedsmoothlora.experiments.worker"]

State = Literal["waiting", "finished", "diverged", "failed"]


@dataclass(frozen=True)
class PlannedRun:
    """One run.

    Attributes:
        name: for people, such as ``fedit, seed 2``.
        config: all that decides its result.
        folder: the run's folder, an ordinary one: `run --resume` and `report` take it.
    """

    name: str
    config: Config
    folder: Path

    @property
    def outcome_file(self) -> Path:
        """File that says how a run ended that did not finish."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def state(self) -> State:
        """How far the run is.

        In one that diverged too few uploads of a round could be used, and would be again; one that failed may
        be tried again.
        """
        rounds = self.config.training.rounds
        # The last thing that a round writes.
        if (self.folder / "checkpoints" / f"{rounds:04d}.json").is_file():
            return "finished"
        state = self.outcome().get("state")
        return state if state in ("diverged", "failed") else "waiting"  # type: ignore[return-value]

    def outcome(self) -> dict[str, str]:
        """``state`` and ``reason`` of a run that did not finish; empty if there is nothing to tell."""
        try:
            found = json.loads(self.outcome_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return dict(found) if isinstance(found, dict) else {}

    def check(self) -> None:
        """Raise ``ConfigError`` if the folder holds another run."""
        file = self.folder / "config.toml"
        if not file.is_file():
            return
        key = first_difference(to_toml(self.config), file.read_text(encoding="utf-8"))
        if key is not None:
            raise ConfigError(
                f"{self.folder} holds a run with another {key}: choose another --out, or remove that folder"
            )


def carry_out(planned_run: PlannedRun, callback: PlannedRunCallback) -> State:
    """Carry out a planned run, or resume it, and write beside its folder how it ended.

    Raises ``InterruptedRunError`` on Ctrl-C; any other error fails this run alone.
    """
    planned_run.folder.parent.mkdir(parents=True, exist_ok=True)
    begun = (planned_run.folder / "config.toml").is_file()
    if not begun and planned_run.folder.exists():
        # Killed before its configuration was written, and so before anything was trained.
        shutil.rmtree(planned_run.folder)
    state: State = "finished"
    reason = ""
    try:
        run(
            planned_run.config,
            out=None if begun else planned_run.folder,
            resume=planned_run.folder if begun else None,
            console=Console(quiet=True),
            verbosity=-1,
            callbacks=[callback],
            outputs=False,
        )
    except (InterruptedRunError, KeyboardInterrupt):
        raise
    except FederationStoppedError as error:
        state, reason = "diverged", str(error)
    except Exception as error:  # whatever it is, it must not cost the other runs
        state, reason = "failed", f"{type(error).__name__}: {error}"
    if state == "finished":
        planned_run.outcome_file.unlink(missing_ok=True)
    else:
        write_outcome(planned_run, state, reason)
    return state


def write_outcome(planned_run: PlannedRun, state: State, reason: str) -> None:
    """Write how a run ended that did not finish."""
    planned_run.outcome_file.parent.mkdir(parents=True, exist_ok=True)
    write_text(planned_run.outcome_file, json.dumps({"state": state, "reason": reason}, indent=2) + "\n")


def run_all(planned_runs: Sequence[PlannedRun], jobs: int, console: Console) -> None:
    """`run_cells`, shown on a console."""
    threads = planned_runs[0].config.machine.threads
    with Display(console) as display:
        if (warning := too_many_threads(threads, jobs, processors())) is not None:
            display.warn(warning)
        carry_out_all(planned_runs, jobs, display)


def carry_out_all(planned_runs: Sequence[PlannedRun], jobs: int, display: Display) -> None:
    """Carry out every planned run that waits or failed before, ``jobs`` at a time.

    One job runs in this process; several run in processes of their own, each with the threads that its
    configuration says, so that their number changes no result.

    Raises:
        ConfigError: a folder holds another run; nothing was run.
        InterruptedRunError: Ctrl-C. Runs in hand stopped after the client in hand and can be gone on with.
    """
    for planned_run in planned_runs:
        planned_run.check()
    waiting = [planned_run for planned_run in planned_runs if planned_run.state in ("waiting", "failed")]
    display.begin(planned_runs, waiting)
    if jobs == 1 or len(waiting) <= 1:
        for planned_run in waiting:
            with display.planned_run(planned_run) as callback:
                callback.ended(carry_out(planned_run, callback), planned_run.outcome())
    else:
        _in_processes(waiting, jobs, display)


def _in_processes(waiting: Sequence[PlannedRun], jobs: int, display: Display) -> None:
    """One thread per process: it sends the process one run after another and shows their events."""
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
            # With a timeout, so that signals are looked at in between.
            while thread.is_alive():
                thread.join(timeout=0.2)
    if pool.errors:
        raise pool.errors[0]
    if pool.stopped:
        raise InterruptedRunError("stopped by Ctrl-C")


class Worker:
    """A process that carries out one planned run after another, `fedsmoothlora.experiments.worker`."""

    def __init__(self) -> None:
        # A file, for a pipe that nobody reads would fill.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self.process = subprocess.Popen(
            _WORKER,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            encoding="utf-8",
            # Ctrl-C comes from us alone, so that no process hears it twice.
            start_new_session=True,
        )

    def events(self, planned_run: PlannedRun) -> Iterator[dict[str, Any]]:
        """Send the process a run; yield the events that it reports until the run ends."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        task = {
            "name": planned_run.name,
            "folder": str(planned_run.folder.absolute()),
            "config": to_toml(planned_run.config),
        }
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            event: dict[str, Any] = json.loads(line)
            yield event
            if "state" in event:
                break

    def exit_message(self) -> str:
        """How the process ended."""
        code = self.process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", errors="replace").strip().splitlines()
        return f"its process ended with code {code}" + (f": {said[-1]}" if said else "")

    def close(self) -> None:
        """End the process, which has nothing to do."""
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
    """The processes that are at work."""

    def __init__(self) -> None:
        self.stopped = False
        self.errors: list[Exception] = []
        # Reentrant: Ctrl-C may come while Ctrl-C is being told.
        self._lock = threading.RLock()
        self._workers: list[Worker] = []

    def start(self) -> Worker | None:
        """A new process; none once all were told to stop."""
        with self._lock:
            if self.stopped:
                return None
            self._workers.append(Worker())
            return self._workers[-1]

    def signal(self, number: int) -> None:
        """Send a signal to all; none is hired any more."""
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
    except Exception as error:  # of this thread, raised by the one that waits
        pool.errors.append(error)
    if worker is not None:
        worker.close()


def _hand_over(planned_run: PlannedRun, worker: Worker, pool: WorkerPool, display: Display) -> bool:
    """Let a process carry out a run and show its events; return whether the process can go on after it.

    A process that dies fails this run alone.
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
    """Ctrl-C goes to the processes: once, they end after the client in hand; twice, at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if pool.stopped:
            pool.signal(signal.SIGTERM)
            raise KeyboardInterrupt
        display.say("stopping after the clients in hand; press Ctrl-C again to stop at once")
        pool.signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def planned_run_from_task(task: Mapping[str, Any]) -> PlannedRun:
    """The planned run that a process was sent."""
    return PlannedRun(str(task["name"]), read(tomllib.loads(task["config"])), Path(task["folder"]))


def side_by_side(machine: MachineSettings, jobs: int) -> MachineSettings:
    """What each of ``jobs`` runs has of a machine: ``machine.threads`` divided among them, at least one each.

    Raises ``ConfigError`` where clients of a run are to train at once too.
    """
    if machine.jobs > 1:
        raise ConfigError(
            f"machine.jobs = {machine.jobs}: here whole runs go side by side, by --jobs, and a run's "
            "clients one after the other: set machine.jobs = 1"
        )
    return replace(machine, threads=max(1, machine.threads // jobs))
