"""Progress of many runs: in a terminal a bar for all and one for each current run, elsewhere lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.federation.records import Metric, RoundRecord
from fedsmoothlora.runs.console import round_line

if TYPE_CHECKING:
    from fedsmoothlora.experiments.planned_runs import PlannedRun


class PlannedRunCallback(Callback):
    """Shows one of many runs; this base class shows nothing."""

    def received(self, event: Mapping[str, Any]) -> None:
        """Show an event of a run in another process: a note, or a round's metrics."""
        if "note" in event:
            self.on_note(str(event["note"]))
        else:
            metrics = [Metric(None, name, value) for name, value in event["metrics"].items()]
            self.on_round_end(RoundRecord(round=event["round"], metrics=metrics))

    def ended(self, state: str, outcome: Mapping[str, str]) -> None:
        """The run has ended."""


class Display:
    """Shows all runs on a console. A context manager: the bars disappear when it ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._all = self._bars.add_task("runs", total=None, visible=False, said="")

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def begin(self, planned_runs: Sequence[PlannedRun], waiting: Sequence[PlannedRun]) -> None:
        """Print how many runs there are, and how many are finished already."""
        done = len(planned_runs) - len(waiting)
        self._bars.update(self._all, total=len(planned_runs), completed=done, visible=True)
        begun = f", {done} of them already finished" if done else ""
        self.say(f"{len(planned_runs)} runs{begun}")

    @contextmanager
    def planned_run(self, planned_run: PlannedRun) -> Iterator[PlannedRunCallback]:
        """Show a bar while a run is carried out."""
        bar = self._bars.add_task(planned_run.name, total=planned_run.config.training.rounds, said="")
        try:
            yield _Shown(self, planned_run.name, planned_run.config.training.rounds, bar)
        finally:
            self._bars.remove_task(bar)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning above the bars."""
        self.console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def move(self, bar: Any, round: int, said: str) -> None:
        """Update a run's bar."""
        self._bars.update(bar, completed=round, said=said)

    def count(self) -> None:
        """Count one more run as ended."""
        self._bars.advance(self._all)


class _Shown(PlannedRunCallback):
    def __init__(self, display: Display, name: str, rounds: int, bar: Any) -> None:
        self._display, self._name, self._rounds, self._bar = display, name, rounds, bar
        self._last = ""

    def on_note(self, text: str) -> None:
        self._display.warn(f"{self._name}: {text}")

    def on_round_end(self, record: RoundRecord) -> None:
        self._last = round_line(record, self._rounds)
        self._display.move(self._bar, record.round, self._last.partition("  ")[2])
        if not self._display.console.is_terminal:
            self._display.say(f"{self._name}: {self._last}")

    def ended(self, state: str, outcome: Mapping[str, str]) -> None:
        self._display.count()
        if state == "finished":
            if self._display.console.is_terminal:
                self._display.say(f"{self._name}: {self._last}")
        else:
            self._display.warn(f"{self._name}: {state}: {outcome.get('reason', '')}")
