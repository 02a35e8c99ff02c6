"""Labelled images or recordings that are stored in files or as bytes in a table."""

from __future__ import annotations

import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.errors import DataError

if TYPE_CHECKING:  # it takes a second to import
    import datasets

_REPORTED = 5  # unusable files that an error lists


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class StoredFiles(ABC):
    """Labelled rows of one file each, which is read when it is needed.

    Attributes:
        item: name of one file's content, and of the column of ``stored`` that holds it.
        plural: name of several.
        stored: a data set with one column of paths or bytes, as ``datasets.Image(decode=False)`` has them.
        folder: the folder to which paths in it are relative.
        labels: ``(rows,)``, int64: the index of each row's class in ``classes``.
        classes: the classes' names, in the labels' order.
        places: the file, or the file and row, of each row, for errors.
        column: the column of the files, for errors; None for a folder of files.
        columns: each further column's texts, ``(rows,)``, by name.
        lists: each further column's lists of texts, ``(rows,)``, by name.
    """

    item: ClassVar[str]
    plural: ClassVar[str]

    stored: datasets.Dataset
    folder: Path
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    places: tuple[str, ...]
    column: str | None = None
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lists: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.labels)

    @staticmethod
    @abstractmethod
    def suffixes() -> Collection[str]:
        """Suffixes of such files in folders, in lower case."""

    @staticmethod
    @abstractmethod
    def feature() -> Any:
        """The feature of ``datasets`` for columns of paths or bytes."""

    @abstractmethod
    def digest(self, row: int) -> bytes:
        """A hash of a row's decoded content.

        Raises ``DataError`` with the place of the row if its file cannot be used.
        """

    def take(self, rows: NDArray[np.int64]) -> Self:
        """These rows only, in the given order."""
        return replace(
            self,
            stored=self.stored.select(rows),
            labels=self.labels[rows],
            places=tuple(self.places[row] for row in rows),
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
            lists={name: [values[row] for row in rows] for name, values in self.lists.items()},
        )

    def place(self, row: int) -> str:
        """The file of a row, or its file and row, for messages."""
        return self.places[row]

    def where(self, row: int) -> str:
        """The file of a row, or its file, row and column, for messages."""
        return self.places[row] + (f", column {self.column!r}" if self.column else "")

    def files(self) -> Iterator[tuple[str, Path]]:
        """The rows that are separate files, each with its name in the data and its path."""
        for batch in self.stored.iter(1000):
            for value in batch[self.item]:
                if value and value["path"] and value["bytes"] is None:
                    yield value["path"], self.folder / value["path"]

    def verify(self) -> list[bytes]:
        """Read every file once.

        Returns a hash of each row's content. Raises ``DataError`` if some files cannot be used; the message
        lists the first of them with file, row and reason.
        """
        hashes: list[bytes] = []
        unusable = []
        for row in range(len(self)):
            try:
                hashes.append(self.digest(row))
            except DataError as error:
                unusable.append(str(error))
        if len(unusable) == 1:
            raise DataError(unusable[0])
        if unusable:
            listed = "\n  ".join(unusable[:_REPORTED])
            more = f"\n  and {len(unusable) - _REPORTED} more" if len(unusable) > _REPORTED else ""
            raise DataError(f"{len(unusable)} of {len(self)} {self.plural} cannot be used:\n  {listed}{more}")
        return hashes

    def _content(self, row: int) -> bytes:
        """The file's bytes. Raises ``DataError`` with the reason if they cannot be read."""
        found = self._found(row)
        try:
            # Libraries are given bytes: Pillow leaves a file open that it cannot read.
            content = found if isinstance(found, bytes) else found.read_bytes()
        except OSError as error:
            raise DataError(f"{str(found)!r} cannot be read: {error.strerror}") from None
        if not content:
            raise DataError(f"the {self.item} is empty: 0 bytes")
        return content

    def _found(self, row: int) -> bytes | Path:
        """The file's bytes, or its path. Raises ``DataError`` if there is neither."""
        value = self.stored[row][self.item] or {"bytes": None, "path": None}
        content: bytes | None = value["bytes"]
        if content is not None:
            return content
        if not value["path"]:
            raise DataError(f"there is no {self.item}; give its path or its bytes")
        path = self.folder / value["path"]
        check_regular(path)
        return path


def check_regular(path: Path) -> None:
    """Raise ``DataError`` for a file that is missing, and for devices, FIFOs and sockets.

    Devices, FIFOs and sockets are not opened, because opening them may block or have side effects.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DataError(f"there is no file {str(path)!r}") from None
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DataError(f"{str(path)!r} is a device, FIFO or socket; should be a file")
    # Files of the kernel count as regular ones, and reading some of them never ends.
    if any(path.resolve().is_relative_to(folder) for folder in ("/proc", "/sys")):
        raise DataError(f"{str(path)!r} is a file of the kernel; should be one of the data")
