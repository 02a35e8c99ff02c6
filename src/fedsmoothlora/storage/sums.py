"""Store the sums of masked uploads, which sites give once, so that a resumed run need not ask again."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fedsmoothlora.errors import StateError
from fedsmoothlora.federation.simulation import BegunSum, KeptSum
from fedsmoothlora.storage.files import make_folder, write_bytes
from fedsmoothlora.storage.hashed_files import read_hashed_json, verified_bytes, write_hashed_json

_ATTEMPTS, _BEGUN = "attempts.json", "begun"


class StoredSums:
    """The sums of a run in a folder.

    ====================  =====================================================================
    ``0001-0``            the integers of round 1's sum; ``0001-1`` of its second one
    ``0001-0.json``       who is summed, and the SHA-256 of the integers
    ``begun-HASH``        the last session whose sites were asked to reveal shares
    ``begun.json``        its round, the name of that file, and its SHA-256
    ``attempts.json``     the last attempt that was begun
    ====================  =====================================================================

    Args:
        folder: the folder of the files; it is made when the first round begins.
        experiment: the run's identity.
    """

    def __init__(self, folder: Path, experiment: str) -> None:
        self._folder = folder
        self._experiment = experiment

    def begin(self, round: int, exchange: int) -> int:
        """The number of a new attempt of a sum, which is recorded: no attempt is begun twice.

        Raises ``StateError`` if the record is damaged, ``StorageError`` if it cannot be written.
        """
        path, attempt = self._folder / _ATTEMPTS, 0
        if path.exists():
            last = read_hashed_json(path)
            if (last["round"], last["exchange"]) == (round, exchange):
                attempt = int(last["attempt"]) + 1
        make_folder(self._folder)
        write_hashed_json(path, {"round": round, "exchange": exchange, "attempt": attempt})
        return attempt

    def keep_begun(self, begun: BegunSum) -> None:
        """Write a session whose sites are about to reveal shares, in place of an earlier one.

        The earlier one stays until ``begun.json`` names the new one, so a crash in between loses neither.
        """
        file = f"{_BEGUN}-{hashlib.sha256(begun.transcript).hexdigest()[:16]}"
        self._write(_BEGUN, begun.transcript, asdict(begun) | {"transcript": None}, file)
        for path in self._folder.glob(f"{_BEGUN}-*"):
            if path.name != file:
                path.unlink()

    def begun(self, round: int, exchange: int) -> BegunSum | None:
        """The stored session of a sum; None if there is none. Raises ``StateError`` if it is damaged."""
        found = self._read(_BEGUN)
        if found is None or (found[1]["round"], found[1]["exchange"]) != (round, exchange):
            return None
        return BegunSum(**found[1] | {"transcript": found[0], "asked": tuple(found[1]["asked"])})

    def keep(self, found: KeptSum) -> None:
        """Write a sum. Raises ``StorageError`` if it cannot be written."""
        table = asdict(found) | {"numbers": found.numbers.dtype.str}
        self._write(_name(found.round, found.exchange), found.numbers.tobytes(), table)

    def load(self, round: int, exchange: int) -> KeptSum | None:
        """The stored sum; None if there is none.

        Raises ``StateError`` if it is damaged: no site gives it again.
        """
        found = self._read(_name(round, exchange))
        if found is None:
            return None
        data, table = found
        lists = {name: tuple(table[name]) for name in ("asked", "summed")}
        return KeptSum(**table | lists | {"numbers": np.frombuffer(data, np.dtype(table["numbers"]))})

    def _write(self, name: str, data: bytes, table: dict[str, Any], file: str = "") -> None:
        """Write the data into ``file``, by default ``name``, and then the table, which names it."""
        write_bytes(self._folder / (file or name), data)
        content = hashlib.sha256(data).hexdigest()
        about = {"experiment": self._experiment, "content": content, "file": file or name}
        write_hashed_json(self._folder / f"{name}.json", {**table, **about})

    def _read(self, name: str) -> tuple[bytes, dict[str, Any]] | None:
        path = self._folder / f"{name}.json"
        if not path.exists():
            return None
        table = read_hashed_json(path)
        if table.pop("experiment") != self._experiment:
            raise StateError(f"{path} belongs to another run")
        file = table.pop("file", name)  # earlier versions did not record it
        return verified_bytes(self._folder / file, table.pop("content")), table


def _name(round: int, exchange: int) -> str:
    return f"{round + 1:04}-{exchange}"
