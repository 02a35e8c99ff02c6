"""The order of arrivals of an asynchronous run, in a file of its folder that is written whole."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from fedsmoothlora.errors import ConfigError, StateError
from fedsmoothlora.federation.arrivals import Event, RoundArrivals
from fedsmoothlora.federation.settings import ParticipationSettings
from fedsmoothlora.storage.files import read_text, write_text

NAME = "arrivals.json"
_FORMAT = 1
_KINDS = ("begin", "arrive", "fail")


class StoredArrivals:
    """The arrivals in ``arrivals.json`` (`fedsmoothlora.federation.arrivals.Arrivals`).

    Every round has ``merged``, the clients whose uploads were merged, each with the round in which it began,
    and ``events``, each with its kind, the client and the time. Rounds are counted from 1.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @property
    def rounds(self) -> Sequence[RoundArrivals]:
        """The finished rounds; none without the file. Raises ``StateError`` if it is damaged."""
        return read_arrivals(self._path) if self._path.exists() else ()

    def record(self, round: int, arrivals: RoundArrivals) -> None:
        """Store the arrivals of a round.

        Raises:
            StateError: the file is damaged, or lacks earlier rounds.
            StorageError: the file cannot be written.
        """
        earlier = self.rounds[:round]
        if len(earlier) < round:
            raise StateError(
                f"{self._path} has the arrivals of {len(earlier)} rounds, and the run has finished {round}; "
                "put the file of a backup in its place"
            )
        lines = ",\n".join(json.dumps(_line(one)) for one in (*earlier, arrivals))
        write_text(self._path, f'{{"format": {_FORMAT}, "rounds": [\n{lines}\n]}}\n')


def read_arrivals(path: Path) -> tuple[RoundArrivals, ...]:
    """The arrivals in a file. Raises ``StateError`` that names the file if it is missing or damaged."""
    try:
        table = json.loads(read_text(path))
        if table["format"] != _FORMAT:
            raise ValueError(f"its format is {table['format']!r}")
        return tuple(_round(line) for line in table["rounds"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{path} is not a record of arrivals: {error}") from None


def replayed(participation: ParticipationSettings) -> tuple[RoundArrivals, ...] | None:
    """The recorded rounds of ``participation.replay``; None if nothing is replayed.

    Raises ``StateError`` if the record is missing or damaged.
    """
    return None if participation.replay is None else read_arrivals(Path(participation.replay) / NAME)


def check_replay(participation: ParticipationSettings, clients: Collection[str], rounds: int) -> None:
    """Raise ``ConfigError`` if the record of ``participation.replay`` cannot be repeated.

    Args:
        participation: ``[participation]``.
        clients: the ids of all clients.
        rounds: the number of rounds of the run.
    """
    try:
        recorded = replayed(participation)
    except StateError as error:
        raise ConfigError(
            f"participation.replay must be the folder of an asynchronous run: {error}"
        ) from None
    if recorded is None:
        return
    which = f"participation.replay = {participation.replay!r}"
    if len(recorded) < rounds:
        raise ConfigError(f"{which} has {len(recorded)} rounds; set training.rounds to at most that")
    for event in (event for one in recorded for event in one.events):
        if event.client not in clients:
            raise ConfigError(f"{which} has a client {event.client!r}, which is not among this run's clients")


def _line(arrivals: RoundArrivals) -> dict[str, Any]:
    return {
        "merged": [[client, began + 1] for client, began in arrivals.merged],
        "events": [[event.kind, event.client, event.time] for event in arrivals.events],
    }


def _round(line: Any) -> RoundArrivals:
    """Raises ``ValueError`` for a line that is no round."""
    for client, began in line["merged"]:
        if type(client) is not str or type(began) is not int or began < 1:
            raise ValueError(f"{[client, began]!r} is not a client with the round in which it began")
    for kind, client, time in line["events"]:
        if (
            kind not in _KINDS
            or type(client) is not str
            or type(time) is not float
            or not math.isfinite(time)
        ):
            raise ValueError(f"{[kind, client, time]!r} is not an event")
    return RoundArrivals(
        merged=tuple((client, began - 1) for client, began in line["merged"]),
        events=tuple(Event(*event) for event in line["events"]),
    )
