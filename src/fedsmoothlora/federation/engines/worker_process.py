"""A forked worker process: its messages to the run, and how each of the two ends if the other dies."""

from __future__ import annotations

import contextvars
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import ClientProcessError

# The answer of a process: plain JSON values, and safetensors files.
Answer = tuple[Mapping[str, Any], Sequence[bytes]]

_LOOKS = 0.5  # seconds between checks that the parent is alive
_ENDS = 10.0  # seconds that a process may take to end after its exit message

_STOPPING = {signal.SIGINT, signal.SIGTERM}  # a batch system sends SIGTERM to every process of a run

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerProcess:
    """A process that works for a client, and the pipe for its messages.

    The process shares the memory of this one. Its messages are JSON and the bytes of safetensors files;
    nothing is pickled.
    """

    client: str
    process: BaseProcess
    connection: Connection

    @classmethod
    def begin(
        cls, client: str, work: Callable[[Callback], Answer], others: Iterable[Connection]
    ) -> WorkerProcess:
        """Start ``work`` in a new process, with the same number of threads as this thread.

        Args:
            client: the client that the process works for.
            work: the function to run; the callback that it receives notifies this process.
            others: connections of other processes, which the new one must close.

        Raises ``ClientProcessError`` if the system does not allow another process.
        """
        ours, theirs = Pipe(duplex=False)
        threads, parent = torch.get_num_threads(), os.getpid()

        def run() -> None:
            for one in (ours, *others):
                one.close()
            _work(work, theirs, threads, parent)

        process = get_context("fork").Process(target=run, daemon=True)
        # The new process must not run this process's handlers before it ignores Ctrl-C and SIGTERM.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            with warnings.catch_warnings():
                # Python warns that other threads may hold locks, but the new process uses none of them.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
        except OSError as error:
            ours.close()
            raise ClientProcessError(
                f"client {client}: cannot start a process: {error.strerror}; fewer clients at once "
                "(machine.jobs, --jobs) need less"
            ) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        return cls(client, process, ours)

    def receive(self, callback: Callback) -> Answer | None:
        """Wait for the next message of the process; return its answer, or None for any other message.

        Raises ``ClientProcessError`` if the process failed or died.
        """
        try:
            said = json.loads(self.connection.recv_bytes())
            files = [self.connection.recv_bytes() for _ in range(said.get("files", 0))]
        except (EOFError, OSError):  # the pipe was closed between two messages or within one
            raise ClientProcessError(
                f"client {self.client}: its process {self._end()} before it had answered. If memory ran out: "
                "fewer clients at once (machine.jobs, --jobs) need less, and so do more parts of a batch "
                "(training.accumulation)"
            ) from None
        if "call" in said:
            getattr(callback, said["call"])(*said["with"])
            return None
        if "failed" in said:
            _log.info("client %s: %s", self.client, said["trace"])
            raise ClientProcessError(f"client {self.client}: {said['failed']}")
        return said["answer"], files

    def close(self) -> None:
        """Wait for the process to end after its answer, and kill it if it does not."""
        self.process.join(_ENDS)
        self.end()

    def end(self) -> None:
        """Kill the process if it is alive, and release its resources."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()

    def _end(self) -> str:
        """The way in which the process ended, for messages."""
        self.process.join(_ENDS)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with code {code}"


class _SendingCallback(Callback):
    """Sends the events of a client to the parent process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def on_client_begin(self, client: str, steps: int) -> None:
        self._call("on_client_begin", client, steps)

    def on_client_step(self, client: str, loss: float) -> None:
        self._call("on_client_step", client, loss)

    def on_client_end(self, client: str) -> None:
        self._call("on_client_end", client)

    def on_note(self, text: str) -> None:
        self._call("on_note", text)

    def _call(self, name: str, *arguments: Any) -> None:
        self.say({"call": name, "with": arguments})

    def say(self, said: Mapping[str, Any], files: Sequence[bytes] = ()) -> None:
        """Send a message to the parent; end this process if the parent has closed the pipe."""
        try:
            for part in (json.dumps(said).encode(), *files):
                self._connection.send_bytes(part)
        except ConnectionError:
            os._exit(1)


def _work(work: Callable[[Callback], Answer], connection: Connection, threads: int, parent: int) -> None:
    """The main function of the process."""
    for number in _STOPPING:  # the parent handles these signals, and ends this process if necessary
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    # A live progress bar may have replaced these streams, and a thread of the parent may hold its lock.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sending = _SendingCallback(connection)

    def answer() -> None:
        torch.set_num_threads(threads)
        try:
            fields, files = work(sending)
        except BaseException as error:  # any error is sent to the parent
            sending.say(
                {"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc().strip()}
            )
        else:
            sending.say({"answer": fields, "files": len(files)}, files)

    # The work runs in a new thread: OpenMP's pool belongs to the thread that first used it. The pool of the
    # forking thread has no threads in this process, so the work would wait for them forever.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(answer,), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_LOOKS)
        if os.getppid() != parent:
            os._exit(1)
