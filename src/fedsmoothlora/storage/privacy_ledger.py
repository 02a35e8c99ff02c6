"""The private releases of a run or a client, in a file that is written before each of them is computed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsmoothlora.errors import StateError
from fedsmoothlora.federation.accounting import Release
from fedsmoothlora.storage.files import read_text, write_text

_FORMAT = 1
_TYPES = {"round": int, "noise_multiplier": float, "sample_rate": float, "epsilon": float}


class StoredLedger:
    """The releases in ``privacy.json`` (`fedsmoothlora.federation.accounting.Ledger`).

    The file is read at every access. A damaged file is an error: to begin again at 0 would forget what the
    run has released.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def releases(self) -> Sequence[Release]:
        """All releases so far, in order; none without the file. Raises ``StateError`` if it is damaged."""
        if not self._path.exists():
            return ()
        try:
            table = json.loads(read_text(self._path))
            if table["format"] != _FORMAT:
                raise ValueError(f"its format is {table['format']!r}")
            return tuple(_release(line) for line in table["releases"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise StateError(
                f"{self._path} is damaged, so it is not known what the run has released: {error}; put the "
                "file of a backup in its place"
            ) from None

    def record(self, release: Release) -> None:
        """Store one more release. Raises ``StorageError`` if the file cannot be written."""
        lines = [_line(one) for one in (*self.releases, release)]
        write_text(self._path, json.dumps({"format": _FORMAT, "releases": lines}, indent=2) + "\n")

    def check(self, rounds: int) -> None:
        """Raise ``StateError`` unless the first ``rounds`` rounds are all among the releases."""
        missing = sorted(set(range(rounds)) - {one.round for one in self.releases})
        if missing:
            what = f"has no release of round {missing[0] + 1}" if self._path.exists() else "is missing"
            raise StateError(
                f"{self._path} {what}, and the run has finished {rounds} rounds: what they have released is "
                "not known; put the file of a backup in its place"
            )


def _line(release: Release) -> dict[str, Any]:
    """A release as plain values; the number of steps is left out if it is 1."""
    line = {name: getattr(release, name) for name in _TYPES}
    return {**line, "round": release.round + 1} | ({} if release.steps == 1 else {"steps": release.steps})


def _release(line: Any) -> Release:
    """Raises ``ValueError`` for a line that is no release."""
    if not isinstance(line, dict) or line.keys() - {"steps"} != _TYPES.keys():
        raise ValueError(f"{line!r} is not a release")
    for name, kind in (_TYPES | ({"steps": int} if "steps" in line else {})).items():
        if type(line[name]) is not kind or math.isnan(line[name]):  # epsilon may be infinite
            raise ValueError(f"{name} = {line[name]!r}")
    if line.get("steps", 1) < 1:
        raise ValueError(f"steps = {line['steps']!r}")
    return Release(**{**line, "round": line["round"] - 1})
