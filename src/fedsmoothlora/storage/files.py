"""Files written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedsmoothlora.errors import StorageError


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; when the block ends well it is flushed to disk and takes its name.

    Whatever is killed at any moment leaves either the old file or the new one, never a part. If the block
    raises, ``path`` stays as it was.

    Raises ``StorageError`` that names ``path`` if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:  # of a full disk, it names no file
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole."""
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole."""
    with write_whole(path) as temporary:
        temporary.write_bytes(data)


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
