"""Callbacks are notified of a run's steps as they happen: consoles, trackers, and callbacks of your own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.printable import counted

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
        history: the records of a resumed run, in order; empty for a new run.
    """

    name: str
    folder: Path
    method: str
    rounds: int
    clients: int
    layers: Mapping[str, Layer]
    head: Sequence[str] = ()
    history: Sequence[RoundRecord] = ()


class Callback:
    """Base class of callbacks. All methods do nothing; a subclass overrides those that it needs.

    A callback changes no metric and no weight. An exception that it raises ends the run, which can be
    resumed.

    Attributes:
        stop_reason: set it to a sentence to end the run after the round in progress. The run then ends as
            after its last round, with report and model. Resuming the run without the callback goes on.
    """

    stop_reason: str | None = None

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
        """The run has something to tell the user.

        Of notes that differ only in numbers and names, the first comes at once, and their count at the end.
        """

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

    @property
    def stop_reason(self) -> str | None:  # type: ignore[override]
        """The first reason that one of the callbacks gives."""
        reasons = (callback.stop_reason for callback in self._callbacks)
        return next((reason for reason in reasons if reason is not None), None)

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


class NotesOnly(Callback):
    """Passes notes on to another callback, and nothing else.

    Args:
        callback: receives the notes.
    """

    def __init__(self, callback: Callback) -> None:
        self._callback = callback

    def on_note(self, text: str) -> None:
        self._callback.on_note(text)


class EarlyStopping(Callback):
    """Ends a run whose metric of the global model has not improved for some rounds.

    A resumed run decides as the uninterrupted run would, from its recorded metrics.

    Args:
        metric: the metric's name.
        patience: the number of rounds in a row without a better value after which the run ends.
        larger_is_better: whether a larger value is better.
        min_delta: the least difference from the best value that counts as better.

    Raises:
        ConfigError: ``patience`` is below 1, ``min_delta`` is below 0, or, once the run begins, the run
            records no such metric.
    """

    def __init__(
        self, metric: str, patience: int, *, larger_is_better: bool = True, min_delta: float = 0.0
    ) -> None:
        if patience < 1:
            raise ConfigError(f"patience = {patience}: it must be at least 1")
        if not min_delta >= 0:
            raise ConfigError(f"min_delta = {min_delta}: it must be at least 0")
        self._metric = metric
        self._patience = patience
        self._sign = 1.0 if larger_is_better else -1.0
        self._min_delta = min_delta
        self._best, self._best_value, self._best_round = -math.inf, math.nan, 0

    def on_run_begin(self, run: RunInfo) -> None:
        self._best, self._best_value, self._best_round = -math.inf, math.nan, 0
        self.stop_reason = None
        for record in run.history:
            self.on_round_end(record)

    def on_round_end(self, record: RoundRecord) -> None:
        value = record.value(self._metric)
        if value is None and record.round == 0:
            names = dict.fromkeys(metric.name for metric in record.metrics if metric.client is None)
            raise ConfigError(
                f"early stopping: there is no metric {self._metric!r}; the run records {', '.join(names)}"
            )
        # NaN is no improvement, nor is a metric that is not measured in every round.
        if value is not None and self._sign * value > self._best + self._min_delta:
            self._best, self._best_value, self._best_round = self._sign * value, value, record.round
        waited = record.round - self._best_round
        if waited >= self._patience:
            self.stop_reason = (
                f"{self._metric} has not improved for {counted(waited, 'round')}; "
                f"its best value was {self._best_value:.4g} (round {self._best_round})"
            )


@dataclass(frozen=True, kw_only=True)
class Setback:
    """A round after which a run had lost more than half of what it had gained.

    Attributes:
        metric: the metric's name.
        round: the round.
        value: its value after the round.
        first: its first value.
        best: the best value before.
        best_round: the round of the best value.
    """

    metric: str
    round: int
    value: float
    first: float
    best: float
    best_round: int

    def __str__(self) -> str:
        moved = "fell" if self.best > self.first else "rose"
        return (
            f"round {self.round}: {self.metric} {moved} to {self.value:.4g}, which loses more than half of "
            f"its way from {self.first:.4g} to {self.best:.4g} (round {self.best_round})"
        )


def setbacks(
    metric: str, values: Mapping[int, float], *, larger_is_better: bool = True, least: float = 0.05
) -> list[Setback]:
    """The rounds in which a run lost more than half of what it had gained.

    The gain is the difference between the best value so far and the first one. Each fall counts once; after a
    new best value the next one counts again. A metric need not be measured in every round. Values before the
    first number are left out: a correlation of constant predictions is NaN.

    Args:
        metric: the metric's name.
        values: its values, by round in order.
        larger_is_better: whether a larger value is better.
        least: gains below this share of the first value's distance to 1 (of the first value, where smaller is
            better) are not looked at: metrics of small test sets go up and down by as much.
    """
    found: list[Setback] = []
    sign = 1.0 if larger_is_better else -1.0
    first, best, best_round, fell = math.nan, math.nan, 0, False
    for round, value in values.items():
        if math.isnan(first):
            first, best, best_round = value, value, round
            continue
        if sign * value > sign * best:
            best, best_round, fell = value, round, False
        gain = sign * (best - first)
        lost = not sign * (value - first) >= gain / 2  # NaN is a loss too
        if not fell and lost and gain >= least * abs(1 - first if larger_is_better else first):
            fell = True
            one = Setback(
                metric=metric, round=round, value=value, first=first, best=best, best_round=best_round
            )
            found.append(one)
    return found


class ProgressLoss(Callback):
    """Notes when a run loses more than half of what it had gained (`setbacks`).

    Args:
        metric: the metric's name.
        note: called with the text.
        larger_is_better: whether a larger value is better.
    """

    def __init__(self, metric: str, note: Callable[[str], None], *, larger_is_better: bool = True) -> None:
        self._metric = metric
        self._note = note
        self._larger_is_better = larger_is_better
        self._values: dict[int, float] = {}

    def on_run_begin(self, run: RunInfo) -> None:
        self._values = {}
        for record in run.history:
            self._keep(record)

    def on_round_end(self, record: RoundRecord) -> None:
        self._keep(record)
        found = setbacks(self._metric, self._values, larger_is_better=self._larger_is_better)
        if found and found[-1].round == record.round:
            self._note(f"{found[-1]}; a smaller training.lr often prevents this")

    def _keep(self, record: RoundRecord) -> None:
        value = record.value(self._metric)
        if value is not None:
            self._values[record.round] = value
