"""The runs below a folder, and the disk that they take."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# The parts of a run's folder, by the name of the folder in it; everything else is records.
PARTS = ("updates", "checkpoints", "clients", "model")
RECORDS = "records"


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """A run on disk.

    Attributes:
        folder: its folder.
        state: ``finished`` if its last round is or if it ended early, otherwise ``unfinished``.
        round: its newest checkpoint, the number of finished rounds.
        rounds: the planned number of rounds; None if ``config.toml`` cannot be read.
        sizes: bytes by part: one of `PARTS`, or `RECORDS`.
    """

    folder: Path
    state: Literal["finished", "unfinished"]
    round: int
    rounds: int | None
    sizes: dict[str, int]

    @property
    def size(self) -> int:
        """All bytes of the folder."""
        return sum(self.sizes.values())


def runs_below(folder: Path) -> list[StoredRun]:
    """The runs in a folder and its subfolders, the largest first; links are not followed."""
    return sorted((_stored(path) for path in _run_folders(folder)), key=lambda run: (-run.size, run.folder))


def _run_folders(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        if {"config.toml", "environment.json"} <= set(files):
            folders.clear()
            yield Path(place)


def _stored(folder: Path) -> StoredRun:
    round = max((int(path.stem) for path in (folder / "checkpoints").glob("[0-9]*.json")), default=0)
    rounds = _rounds(folder / "config.toml")
    ended = (folder / "stopped.json").is_file() or round == rounds
    return StoredRun(
        folder=folder,
        state="finished" if ended else "unfinished",
        round=round,
        rounds=rounds,
        sizes=_sizes(folder),
    )


def _rounds(config: Path) -> int | None:
    try:
        table: dict[str, Any] = tomllib.loads(config.read_text(encoding="utf-8"))
        return int(table["training"]["rounds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sizes(folder: Path) -> dict[str, int]:
    sizes = dict.fromkeys((*PARTS, RECORDS), 0)
    for place, _, files in os.walk(folder):
        first = Path(place).relative_to(folder).parts[:1]
        part = first[0] if first and first[0] in PARTS else RECORDS
        for name in files:
            try:
                sizes[part] += os.lstat(Path(place) / name).st_size
            except FileNotFoundError:  # a run in progress removes files
                continue
    return sizes
