"""A warm process: it keeps a site's data and model, and answers the messages of one client in one run.

It serves one message at a time, and ends

- if a ClientApp wants a process of another identity: another run, configuration or version of this package;
- after an answer that is not complete, because an error may have left the model in any state;
- if the ClientApp's process that waits for an answer ends, even in the middle of training; state is written
  whole at all times;
- with the process that starts the ClientApps, which ends with its SuperNode;
- after ``flower.timeout`` seconds without a message.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsmoothlora.errors import SiteError, WireError
from fedsmoothlora.flower.frames import receive_exactly, receive_question, send_answer
from fedsmoothlora.flower.questions import Answer, Question
from fedsmoothlora.flower.warm import IDENTITY, YES, check_peer

if TYPE_CHECKING:
    from fedsmoothlora.flower.site import Site

_GREETING = 30.0
_LONGEST_WAIT = 2**31 - 1  # milliseconds


def serve(
    listener: socket.socket,
    supervisor: int,
    identity: bytes,
    idle: float,
    answer: Callable[[Question], Answer],
) -> None:
    """Answer questions until the process must end.

    Args:
        listener: the listening socket.
        supervisor: a descriptor that becomes readable when the process must end.
        identity: the process's identity.
        idle: seconds without a message after which it ends.
        answer: answers a question.
    """
    while _readable(listener, supervisor, idle):
        connection, _ = listener.accept()
        with connection:
            try:
                if not _greets(connection, identity):
                    return
                question = receive_question(connection)
                with _ending_with(connection, supervisor):
                    found = answer(question)
                send_answer(connection, found)
            except (OSError, SiteError, WireError):
                return
        if found.status != "done":
            return
        del question, found


def _readable(listener: socket.socket, supervisor: int, idle: float) -> bool:
    """Wait for a connection; false if there is none for ``idle`` seconds or the supervisor has ended."""
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    poll.register(supervisor, select.POLLIN)
    ready = [descriptor for descriptor, _ in poll.poll(min(idle * 1000, _LONGEST_WAIT))]
    return ready == [listener.fileno()]


def _greets(connection: socket.socket, identity: bytes) -> bool:
    """Say yes to a process of the same user that wants this identity."""
    check_peer(connection)
    connection.settimeout(_GREETING)
    if receive_exactly(connection, IDENTITY) != identity:
        return False
    connection.sendall(YES)
    connection.settimeout(None)
    return True


@contextmanager
def _ending_with(connection: socket.socket, supervisor: int) -> Iterator[None]:
    """End this process at once if the other end of the connection, or the supervisor, ends in the block."""
    done = os.eventfd(0)
    poll = select.poll()
    poll.register(done, select.POLLIN)
    poll.register(supervisor, select.POLLIN)
    poll.register(connection, select.POLLRDHUP)

    def watch() -> None:
        if done not in [descriptor for descriptor, _ in poll.poll()]:
            os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.eventfd_write(done, 1)
        thread.join()
        os.close(done)


def _answers(config: Path, node: Mapping[str, Any]) -> Callable[[Question], Answer]:
    """Answers questions; the first one imports torch, reads the data and loads the model."""

    @cache
    def site() -> Site:
        from fedsmoothlora.config import read
        from fedsmoothlora.flower.site import KeptPreparation, Site

        return Site.at(read(config), node, KeptPreparation())

    def answered(question: Question) -> Answer:
        from fedsmoothlora.flower.answering import answer

        return answer(site, question)

    return answered


def main(answers: Callable[[Path, Mapping[str, Any]], Callable[[Question], Answer]] = _answers) -> None:
    """Serve with the arguments of `fedsmoothlora.flower.warm`.

    Args:
        answers: returns the function that answers questions at a site, which is known by the federation's
            ``config.toml`` and the values of ``--node-config``.
    """
    arguments = json.loads(sys.argv[1])
    if os.fork():  # the ClientApp's process waits for this one only
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    logging.basicConfig(format="%(levelname)s : %(message)s")
    answer = answers(Path(arguments["config"]), arguments["node"])
    with socket.socket(fileno=arguments["listener"]) as listener:
        identity = bytes.fromhex(arguments["identity"])
        serve(listener, arguments["supervisor"], identity, arguments["idle"], answer)
    # Nothing is left to be written, and libraries' threads must not keep the memory.
    os._exit(0)


if __name__ == "__main__":
    main()
