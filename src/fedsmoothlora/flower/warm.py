"""The ClientApp's side of a warm process: a site's process that keeps data and model between messages.

Flower 1.41 starts a new process for every message, with ``--isolation process`` too. Its pools of warm
executors are for other kinds of apps, on Kubernetes. The ClientApp's process therefore asks a warm process,
which the first message of a run starts. If there is none for any reason, the ClientApp's process answers the
message itself.

The warm process listens on a Unix socket with mode 0600, in a folder with mode 0700 below the site's state::

    STATE/warm/SHA-256 OF THE CLIENT'S ID, 32 DIGITS/socket

A socket's address has at most 107 bytes. It is therefore ``/proc/self/fd/N/socket``, where N is the open
folder, so the path of the state folder may have any length. A connection begins with the identity of the
wanted process (`identity`), 32 bytes. A process with this identity answers `YES`; any other ends. Then one
question and one answer are exchanged as in `fedsmoothlora.flower.frames`.

All of this is for Linux. This module imports neither torch nor Flower.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import stat
import struct
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from fedsmoothlora.errors import SiteError
from fedsmoothlora.flower.frames import receive_answer, receive_exactly, send_question
from fedsmoothlora.flower.questions import Answer, Question

YES = b"\x01"
IDENTITY = 32
_NO_IDENTITY = bytes(IDENTITY)
_SOCKET = "socket"
# Seconds until a warm process must have said yes or no, even if it has just been started on a busy machine.
_GREETING = 120.0
_MOST_ENTRIES = 1000
_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """A ClientApp's process as its warm process must know it.

    Attributes:
        config: the federation's ``config.toml``.
        node: the values of ``--node-config``.
        run: Flower's number of the run.
        program: the module that is the warm process.
    """

    config: Path
    node: Mapping[str, Any]
    run: int
    program: str = "fedsmoothlora.flower.warm_process"

    @property
    def state(self) -> Path:
        """The folder of the site's state, or the one that ``--node-config`` names for warm processes."""
        return Path(str(self.node.get("warm") or self.node.get("state", "fedsmoothlora-state")))

    @property
    def folder(self) -> str:
        """The name of the client's folder in ``STATE/warm``."""
        return hashlib.sha256(str(self.node["client-id"]).encode()).hexdigest()[:32]


def warm_answer(start: WarmStart, question: Question) -> Answer | None:
    """The warm process's answer; a process is started if there is none.

    Returns:
        The answer, or None with ``flower.warm = false`` and in Flower's simulation, whose processes stay.

    Raises:
        SiteError: a process cannot be used, or it ended before it had answered. The question may be answered
            again: the work is deterministic, and state is written whole.
    """
    try:
        config = start.config.read_bytes()
        settings = _section(tomllib.loads(config.decode()), "flower")
        if not settings.get("warm", True) or not _is_site(start):
            return None
        with _private_folder(start) as folder:
            wanted = identity(start, config)
            connection = _greeted(folder, wanted) or _started(folder, start, wanted, settings)
            with connection:
                send_question(connection, question)
                return receive_answer(connection)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise SiteError(str(error) or type(error).__name__) from None


def end_warm_process(start: WarmStart) -> None:
    """End the client's warm process, if there is one, and remove its socket."""
    if not _is_site(start) or not (start.state / "warm" / start.folder).exists():
        return
    with suppress(OSError, SiteError):
        with _private_folder(start) as folder:
            _greeted(folder, _NO_IDENTITY)
            _remove_socket(folder)
        (start.state / "warm" / start.folder).rmdir()
        (start.state / "warm").rmdir()  # fails while other clients use it


def identity(start: WarmStart, config: bytes) -> bytes:
    """The identity of the warm process of a run: 32 bytes that differ if any of the following differs.

    The run, the configuration, the node's values, the current folder; the code of this package, the installed
    packages and Python; size and time of the files of data and model, or of a folder's first 1000 entries.

    Args:
        start: the ClientApp's process.
        config: the content of ``start.config``.
    """
    code = sorted((str(path), *_stamp(path)) for path in _PACKAGE.rglob("*.py"))
    settings = tomllib.loads(config.decode())
    sources = [start.node.get(key) or _section(settings, key).get("source") for key in ("data", "model")]
    sources += [_section(settings, "data").get(key) for key in ("path", "test")]
    parts = [
        (start.run, str(start.config), hashlib.sha256(config).hexdigest(), sorted(start.node.items())),
        (os.getppid(), str(Path.cwd())),
        (version("fedsmoothlora"), code, _stamp(Path(sysconfig.get_path("purelib")))),
        (sys.version, sys.executable),
        [_entries(Path(str(source))) for source in sources],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def check_peer(connection: socket.socket) -> None:
    """Raise ``SiteError`` if the process at the other end belongs to another user."""
    form = "iII"  # process, user, group
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(form))
    _, user, _ = struct.unpack(form, found)
    if user != os.geteuid():
        raise SiteError(f"the process at the other end of the socket belongs to user {user}")


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of a configuration; empty if there is none. The configuration is checked where it is read."""
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def _is_site(start: WarmStart) -> bool:
    """Whether the node is a site, and no node of Flower's simulation."""
    return isinstance(start.node.get("client-id"), str)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _entries(path: Path) -> list[tuple[str, int, int]]:
    """Sizes and times of a file, or of a folder and its first entries; of neither for anything else."""
    try:
        inside = sorted(islice(path.iterdir(), _MOST_ENTRIES)) if path.is_dir() else []
    except OSError:
        inside = []
    return [(str(one), *_stamp(one)) for one in (path, *inside)]


# -- the folder and the socket ---------------------------------------------------------------------------


@contextmanager
def _private_folder(start: WarmStart) -> Iterator[int]:
    """The client's folder, open and locked; at most one ClientApp uses a warm process at a time.

    Raises ``SiteError`` if other users can enter it or another process has locked it, and ``OSError`` if it
    cannot be opened or is a symlink.
    """
    start.state.mkdir(parents=True, exist_ok=True)
    outer = os.open(start.state, os.O_RDONLY | os.O_DIRECTORY)
    folders = [outer]
    try:
        for name in ("warm", start.folder):
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=folders[-1])
            how = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            folders.append(os.open(name, how, dir_fd=folders[-1]))
            found = os.fstat(folders[-1])
            if found.st_uid != os.geteuid() or found.st_mode & 0o077:
                raise SiteError(
                    f"{start.state / 'warm'}: it and its folders must belong to this user alone (mode 700)"
                )
        try:
            fcntl.flock(folders[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SiteError("another message of this client is being answered") from None
        yield folders[-1]
    finally:
        for folder in folders:
            os.close(folder)


def _address(folder: int) -> str:
    return f"/proc/self/fd/{folder}/{_SOCKET}"


def _greeted(folder: int, wanted: bytes) -> socket.socket | None:
    """A connection to the process with this identity. If it has another one, wait for its end.

    Raises ``SiteError`` if something else has the socket's name.
    """
    try:
        found = os.stat(_SOCKET, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        raise SiteError("the file with the name of the warm process's socket is no socket of this user")
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(_address(folder))
        if _says_yes(connection, wanted):
            return connection
    except ConnectionError:  # it has ended, now or before
        pass
    except BaseException:
        connection.close()
        raise
    connection.close()
    return None


def _says_yes(connection: socket.socket, wanted: bytes) -> bool:
    check_peer(connection)
    connection.settimeout(_GREETING)
    connection.sendall(wanted)
    said = receive_exactly(connection, len(YES))
    connection.settimeout(None)  # training takes its time; the end of the process ends the connection
    return said == YES


def _remove_socket(folder: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(_SOCKET, dir_fd=folder)


def _started(folder: int, start: WarmStart, wanted: bytes, settings: Mapping[str, Any]) -> socket.socket:
    """Start a warm process and return a connection to it.

    It inherits the listening socket, so this process can connect at once, and a descriptor of the process
    that starts the ClientApps, with which it ends.
    """
    _remove_socket(folder)
    supervisor = os.pidfd_open(os.getppid())
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            os.fchmod(listener.fileno(), 0o600)  # the mode of the socket's file
            listener.bind(_address(folder))
            listener.listen()
            arguments = {
                "listener": listener.fileno(),
                "supervisor": supervisor,
                "identity": wanted.hex(),
                "config": str(start.config),
                "node": dict(start.node),
                "idle": settings.get("timeout", 3600.0),
            }
            # -P: the current folder is no place for modules.
            command = [sys.executable, "-P", "-m", start.program, json.dumps(arguments)]
            # The started process only forks the one that stays, so no child is left to this one.
            subprocess.run(
                command, stdin=subprocess.DEVNULL, pass_fds=(listener.fileno(), supervisor), check=True
            )
    finally:
        os.close(supervisor)
    connection = _greeted(folder, wanted)
    if connection is None:
        raise SiteError("the warm process ended before it could answer")
    return connection
