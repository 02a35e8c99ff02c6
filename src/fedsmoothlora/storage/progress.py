"""``progress.json``: the round in progress and the clients in hand, for those who watch a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from fedsmoothlora.storage.files import replace_text

MOST_IN_HAND = 50
"""So many of the clients in hand are named."""


@dataclass(frozen=True, kw_only=True)
class ClientInHand:
    """A client that trains: the finished steps, all its steps, and the loss of the last step."""

    step: int
    steps: int
    loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        written: seconds since 1970.
        rounds: the number of rounds.
        round: the round in progress, counted from 1; None between rounds.
        clients: the number of clients that this round asked; None between rounds, and in a private run.
        done: the number of those that have finished.
        training: the number of those that train.
        in_hand: the first `MOST_IN_HAND` of those that train, by name.
    """

    written: float
    rounds: int
    round: int | None = None
    clients: int | None = None
    done: int = 0
    training: int = 0
    in_hand: Mapping[str, ClientInHand] = field(default_factory=dict)


def write_progress(path: Path, progress: Progress) -> None:
    """Write the file whole. Raises ``StorageError`` if it cannot be written."""
    replace_text(path, json.dumps(asdict(progress)) + "\n")


def parse_progress(content: bytes) -> Progress | None:
    """The content of the file; None if it is not valid."""
    try:
        return TypeAdapter(Progress).validate_json(content)
    except ValidationError:
        return None
