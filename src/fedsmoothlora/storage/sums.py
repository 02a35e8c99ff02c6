"""Store the sums of masked uploads, which sites give once, so that a resumed run need not ask again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from fedsmoothlora.errors import StateError
from fedsmoothlora.federation.simulation import KeptSum
from fedsmoothlora.storage.files import make_folder, write_bytes
from fedsmoothlora.storage.hashed_files import read_hashed_json, verified_bytes, write_hashed_json

_LAST = "attempts.json"


class StoredSums:
    """The sums of a run in a folder: ``0001.integers`` with ``0001.json``, and so on.

    Args:
        folder: the folder of the files; it is made when the first round begins.
        experiment: the run's identity.
    """

    def __init__(self, folder: Path, experiment: str) -> None:
        self._folder = folder
        self._experiment = experiment

    def begin(self, round: int) -> int:
        """The number of a new attempt of a round, which is recorded: no attempt is begun twice.

        Raises ``StateError`` if the record is damaged, ``StorageError`` if it cannot be written.
        """
        path, attempt = self._folder / _LAST, 0
        if path.exists():
            last = read_hashed_json(path)
            attempt = int(last["attempt"]) + 1 if last["round"] == round else 0
        make_folder(self._folder)
        write_hashed_json(path, {"round": round, "attempt": attempt})
        return attempt

    def keep(self, found: KeptSum) -> None:
        """Write the sum of a round. Raises ``StorageError`` if it cannot be written."""
        integers, table = self._paths(found.round)
        data = found.numbers.tobytes()
        write_bytes(integers, data)
        write_hashed_json(
            table,
            {
                "experiment": self._experiment,
                "attempt": found.attempt,
                "asked": list(found.asked),
                "summed": list(found.summed),
                "refused": found.refused,
                "sent": found.sent,
                "dtype": found.numbers.dtype.str,
                "integers": hashlib.sha256(data).hexdigest(),
            },
        )

    def load(self, round: int) -> KeptSum | None:
        """The stored sum of a round; None if there is none.

        Raises ``StateError`` if it is damaged: no site gives it again.
        """
        integers, path = self._paths(round)
        if not path.exists():
            return None
        table = read_hashed_json(path)
        if table["experiment"] != self._experiment:
            raise StateError(f"{path} belongs to another run")
        return KeptSum(
            round=round,
            attempt=table["attempt"],
            asked=tuple(table["asked"]),
            summed=tuple(table["summed"]),
            refused=table["refused"],
            sent=table["sent"],
            numbers=np.frombuffer(verified_bytes(integers, table["integers"]), np.dtype(table["dtype"])),
        )

    def _paths(self, round: int) -> tuple[Path, Path]:
        return tuple(self._folder / f"{round + 1:04}.{form}" for form in ("integers", "json"))  # type: ignore[return-value]
