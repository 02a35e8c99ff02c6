"""Read runs below one folder, and nothing outside it.

Folders and files are opened one below the other and never through a symbolic link, so that a name, a link, or
a link that appears between a check and its use cannot lead out of the folder.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fedsmoothlora.errors import ConfigError, NoRunError

_DEEPEST = 4  # `compare` writes OUT/runs/LABEL/SEED
_MOST_FOLDERS = 20_000
_MOST_BYTES = 16 << 20
# Files that are read piece by piece, so that they may be of any size.
_LONG_FILES = ("metrics.jsonl", "run.log")


@dataclass(frozen=True)
class RunFiles:
    """The files of one run's folder, which is open."""

    path: Path
    descriptor: int

    def opener(self, path: str, flags: int) -> int:
        """Open a file of the folder, as the ``opener`` of ``open``.

        Raises:
            FileNotFoundError: there is no such file, or it is a link, a folder or a device.
            OSError: it cannot be read, or is too large to be a file of a run.
        """
        name = Path(path).name
        # A pipe would block without O_NONBLOCK.
        safe = flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            opened = os.open(name, safe, dir_fd=self.descriptor)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise FileNotFoundError(errno.ENOENT, "it is a symbolic link", name) from None
            raise
        try:
            found = os.fstat(opened)
            if not stat.S_ISREG(found.st_mode):
                raise FileNotFoundError(errno.ENOENT, "it is not a regular file", name)
            if found.st_size > _MOST_BYTES and name not in _LONG_FILES:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), name)
        except OSError:
            os.close(opened)
            raise
        return opened

    def open(self, name: str) -> BinaryIO | None:
        """A file to read; None if there is none that may be read."""
        try:
            return open(name, "rb", opener=self.opener)
        except OSError:
            return None

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if there is none that may be read."""
        file = self.open(name)
        if file is None:
            return None
        with file:
            return file.read(_MOST_BYTES)

    def stamp(self, *names: str) -> tuple[tuple[int, int, int] | None, ...]:
        """A value that changes whenever one of the files is written, replaced or removed."""
        return tuple(map(self._stamp, names))

    def _stamp(self, name: str) -> tuple[int, int, int] | None:
        try:
            found = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


class WatchedFolder:
    """The folder of a run, or a folder with runs below it.

    Args:
        path: the folder; it may be a symbolic link itself.

    Raises:
        ConfigError: it is not a folder, or the system cannot open files without following links.
    """

    def __init__(self, path: Path) -> None:
        if not hasattr(os, "O_NOFOLLOW"):
            raise ConfigError(
                "watch needs a system that can open files without following links, as Linux and macOS"
            )
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder: give the folder of a run, or one with runs in it")
        self.path = path.resolve()

    @property
    def is_run(self) -> bool:
        """Whether the folder is the folder of a run itself."""
        with self.open_run("") as files:
            return None not in files.stamp("config.toml", "environment.json")

    @contextmanager
    def open_run(self, run: str) -> Iterator[RunFiles]:
        """Open a run's folder.

        Args:
            run: its path below this folder, with slashes; empty for this folder itself.

        Raises:
            NoRunError: there is no such folder, or the path is not one below this folder.
        """
        parts = run.split("/") if run else []
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise NoRunError("there is no such run in the folder that is watched")
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = -1
        try:
            try:
                descriptor = os.open(self.path, flags)
                for part in parts:
                    inner = os.open(part, flags, dir_fd=descriptor)
                    os.close(descriptor)
                    descriptor = inner
            except (OSError, ValueError):
                raise NoRunError(
                    "there is no such run in the folder that is watched; was it deleted?"
                ) from None
            yield RunFiles(self.path.joinpath(*parts), descriptor)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def runs(self) -> list[str]:
        """The paths of the runs below this folder, those that began last first."""
        found: list[tuple[int, str]] = []
        for visited, (path, folders, files, descriptor) in enumerate(os.fwalk(self.path)):
            parts = Path(path).relative_to(self.path).parts
            if parts and "config.toml" in files and "environment.json" in files:
                folders.clear()  # the folders of a run hold no runs
                name = "/".join(parts)
                with suppress(OSError, UnicodeEncodeError):
                    name.encode()  # a name that is no Unicode has no address
                    began = os.stat("config.toml", dir_fd=descriptor, follow_symlinks=False)
                    found.append((began.st_mtime_ns, name))
            elif len(parts) == _DEEPEST or visited >= _MOST_FOLDERS:
                folders.clear()
            else:
                folders[:] = [name for name in folders if not name.startswith(".")]
        return [name for _, name in sorted(found, reverse=True)]
