"""Write files and folders whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fedsmoothlora.errors import FedSmoothLoRAError, StateError, StorageError

_PART = ".part"  # the ending of a file or folder that is still being written


@contextmanager
def storage_errors(path: Path, action: str = "written") -> Iterator[None]:
    """Convert the system's errors to ``StorageError`` with ``path`` and ``action``.

    The system's own errors do not always name a file, for instance if the disk is full.
    """
    try:
        yield
    except FedSmoothLoRAError:
        raise
    except OSError as error:
        raise StorageError(f"{path} cannot be {action}: {error.strerror or error}") from error
    except SafetensorError as error:  # safetensors has its own class for errors of files
        raise StorageError(f"{path} cannot be {action}: {error}") from error


def make_folder(path: Path) -> None:
    """Make a folder and its parents if they do not exist. Raises ``StorageError`` if that fails."""
    with storage_errors(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def write_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``. The file is flushed to disk and renamed to ``path`` at the end.

    If the process is killed at any moment, ``path`` has either the old content or the new one. If the block
    raises an error, ``path`` is not changed.

    Raises ``StorageError`` if ``path`` cannot be written.
    """
    temporary = _temporary(path)
    try:
        with storage_errors(path):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
            _flush_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def write_whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, renamed to ``path`` at the end; ``path`` must be new or empty.

    Raises ``StorageError`` if ``path`` cannot be written.
    """
    temporary = _temporary(path)
    try:
        with storage_errors(path):
            # A process that was killed may have left one; in containers, process ids are often the same.
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            if path.is_dir():
                path.rmdir()
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_new_or_empty(path: Path) -> bool:
    """Whether ``path`` does not exist or is an empty folder. Raises ``StorageError`` if it cannot be read."""
    with storage_errors(path, "read"):
        return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole."""
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole, without flushing it to disk.

    For files that are written often and that may be lost when the machine fails.
    """
    temporary = _temporary(path)
    try:
        with storage_errors(path):
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole."""
    with write_whole(path) as temporary:
        temporary.write_bytes(data)


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises ``StateError`` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from None


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file. Raises ``StateError`` if it cannot be read."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise StateError(f"{path} is not UTF-8 text: {error}") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in blocks. Raises ``StateError`` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from None


def remove_parts(folder: Path) -> None:
    """Remove the half-written files and folders that a killed process left in ``folder``."""
    for part in sorted(folder.rglob(f".*{_PART}")):
        with storage_errors(part):
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def is_part(path: Path) -> bool:
    """Whether a path is the temporary path of a file or folder that was not completed."""
    return path.name.startswith(".") and path.name.endswith(_PART)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{_PART}")


def _flush_folder(folder: Path) -> None:
    """Flush a rename to disk, on systems that support it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
