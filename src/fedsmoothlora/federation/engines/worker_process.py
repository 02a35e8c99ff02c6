"""Work in a process that is forked off this one: how it is heard, and how both end when one of them dies."""

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

_LOOKS = 0.5  # seconds between looks at whether the parent is alive
_ENDS = 10.0  # seconds that a process may take to end after its last word

_STOPPING = {signal.SIGINT, signal.SIGTERM}  # a batch system sends SIGTERM to every process of a run

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerProcess:
    """A process at work for a client, and the pipe through which it speaks.

    It has all that this process had in memory, at the same pages. What it says is JSON, and bytes of files:
    nothing is pickled.
    """

    client: str
    process: BaseProcess
    connection: Connection

    @classmethod
    def begin(
        cls, client: str, work: Callable[[Callback], Answer], others: Iterable[Connection]
    ) -> WorkerProcess:
        """Begin ``work`` in a process of its own, with as many threads as this thread has.

        Args:
            client: the client that it works for.
            work: its work; the callback that it receives notifies this process.
            others: ends of pipes that the process must not hold open.

        Raises ``ClientProcessError`` where the system allows no further process.
        """
        ours, theirs = Pipe(duplex=False)
        threads, parent = torch.get_num_threads(), os.getpid()

        def run() -> None:
            for one in (ours, *others):
                one.close()
            _work(work, theirs, threads, parent)

        process = get_context("fork").Process(target=run, daemon=True)
        # Until it ignores Ctrl-C and SIGTERM, it must not run this process's handlers.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            with warnings.catch_warnings():
                # Python warns that other threads' locks may be held; what is used there is none of theirs.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
        except OSError as error:
            ours.close()
            raise ClientProcessError(
                f"client {client}: there can be no process for it: {error.strerror}; fewer clients at once "
                "(machine.jobs, --jobs) take less"
            ) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        return cls(client, process, ours)

    def receive(self, callback: Callback) -> Answer | None:
        """Wait for the next thing that the process says; its answer, if that is it.

        Raises ``ClientProcessError`` if it failed or died.
        """
        try:
            said = json.loads(self.connection.recv_bytes())
            files = [self.connection.recv_bytes() for _ in range(said.get("files", 0))]
        except (EOFError, OSError):  # the end of the pipe, between two messages or within one
            raise ClientProcessError(
                f"client {self.client}: its process {self._end()} before it had answered. If memory ran out: "
                "fewer clients at once (machine.jobs, --jobs) take less, and so do more parts of a batch "
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
        """Let the process end, which has answered."""
        self.process.join(_ENDS)
        self.end()

    def end(self) -> None:
        """End the process, if it has not."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()

    def _end(self) -> str:
        """How the process ended."""
        self.process.join(_ENDS)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with code {code}"


class _SendingCallback(Callback):
    """Tells the parent all that happens to a client."""

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
        """Say something; a process that nobody listens to any more ends."""
        try:
            for part in (json.dumps(said).encode(), *files):
                self._connection.send_bytes(part)
        except ConnectionError:
            os._exit(1)


def _work(work: Callable[[Callback], Answer], connection: Connection, threads: int, parent: int) -> None:
    """The main function of the process."""
    for number in _STOPPING:  # the parent handles them, and ends this process where it must
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    # A live progress bar in their place has a lock that a thread of the parent may hold.
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sending = _SendingCallback(connection)

    def answer() -> None:
        torch.set_num_threads(threads)
        try:
            fields, files = work(sending)
        except BaseException as error:  # whatever it is, the parent is told
            sending.say(
                {"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc().strip()}
            )
        else:
            sending.say({"answer": fields, "files": len(files)}, files)

    # In a thread of its own: OpenMP's pool belongs to the thread that first used it, and the pool of the one
    # that forked has no threads in this process, so that it would wait for them for ever.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(answer,), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_LOOKS)
        if os.getppid() != parent:
            os._exit(1)
