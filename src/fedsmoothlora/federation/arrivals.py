"""The order in which clients began and uploads arrived in asynchronous rounds, on which results depend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

EventKind = Literal["begin", "arrive", "fail"]


@dataclass(frozen=True)
class Event:
    """One event: a client begins, its upload arrives, or it ends without an upload.

    Attributes:
        kind: what happened.
        client: the client's id.
        time: when, in simulated time; in seconds since the run began where clients are on other machines.
    """

    kind: EventKind
    client: str
    time: float


@dataclass(frozen=True)
class RoundArrivals:
    """The events of one round.

    Attributes:
        merged: the clients whose uploads were merged, each with the round in which it began.
        events: the events since the last round, in order.
    """

    merged: tuple[tuple[str, int], ...]
    events: tuple[Event, ...]


class Arrivals(Protocol):
    """Storage of the arrivals of a run."""

    @property
    def rounds(self) -> Sequence[RoundArrivals]:
        """The finished rounds, in order."""
        ...

    def record(self, round: int, arrivals: RoundArrivals) -> None:
        """Store the arrivals of a round. Rounds after it, of a run that was resumed before them, are gone."""
        ...


class MemoryArrivals:
    """Arrivals in memory."""

    def __init__(self) -> None:
        self.rounds: list[RoundArrivals] = []

    def record(self, round: int, arrivals: RoundArrivals) -> None:
        """Store the arrivals of a round."""
        self.rounds[round:] = [arrivals]
