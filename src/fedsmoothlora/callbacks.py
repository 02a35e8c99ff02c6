"""Callbacks are notified of a run's steps as they happen: consoles, trackers, and callbacks of your own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsmoothlora.algebra.update import Layer
    from fedsmoothlora.federation.records import RoundRecord


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The properties of a run that are known when it begins.

    Attributes:
        name: its name.
        folder: its folder.
        method: the method's name.
        rounds: the number of rounds.
        clients: the number of clients.
        layers: the adapted layers, by name.
        head: names of the parameters that are trained whole.
    """

    name: str
    folder: Path
    method: str
    rounds: int
    clients: int
    layers: Mapping[str, Layer]
    head: Sequence[str] = ()


class Callback:
    """Base class of callbacks. All methods do nothing; a subclass overrides those that it needs.

    A callback changes no result. An exception that it raises ends the run, which can be resumed.
    """

    def on_run_begin(self, run: RunInfo) -> None:
        """The run begins or is resumed; the model and the data are loaded."""

    def on_round_begin(self, round: int, rounds: int, clients: int) -> None:
        """Round ``round``, counted from 0, of ``rounds`` begins with that many clients."""

    def on_client_begin(self, client: str, steps: int) -> None:
        """A client begins its calibration and ``steps`` steps of local training."""

    def on_client_step(self, client: str, loss: float) -> None:
        """A client finished a step of local training with this loss."""

    def on_client_end(self, client: str) -> None:
        """A client finished its round, or left it because of an error."""

    def on_note(self, text: str) -> None:
        """The run has something to tell the user."""

    def on_round_end(self, record: RoundRecord) -> None:
        """The metrics of a round are recorded; round 0 is the evaluation before any training.

        The checkpoint of the round is written afterwards, so a run that is killed in between calls this again
        for the same round.
        """

    def on_run_end(self) -> None:
        """The run is over: finished, stopped or failed."""


class Callbacks(Callback):
    """Several callbacks as one; each is notified in turn.

    Args:
        callbacks: in the order in which they are notified.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = tuple(callbacks)

    def on_run_begin(self, run: RunInfo) -> None:
        for callback in self._callbacks:
            callback.on_run_begin(run)

    def on_round_begin(self, round: int, rounds: int, clients: int) -> None:
        for callback in self._callbacks:
            callback.on_round_begin(round, rounds, clients)

    def on_client_begin(self, client: str, steps: int) -> None:
        for callback in self._callbacks:
            callback.on_client_begin(client, steps)

    def on_client_step(self, client: str, loss: float) -> None:
        for callback in self._callbacks:
            callback.on_client_step(client, loss)

    def on_client_end(self, client: str) -> None:
        for callback in self._callbacks:
            callback.on_client_end(client)

    def on_note(self, text: str) -> None:
        for callback in self._callbacks:
            callback.on_note(text)

    def on_round_end(self, record: RoundRecord) -> None:
        for callback in self._callbacks:
            callback.on_round_end(record)

    def on_run_end(self) -> None:
        for callback in self._callbacks:
            callback.on_run_end()
