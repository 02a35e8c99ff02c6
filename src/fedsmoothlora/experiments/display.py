"""What people see while cells run: a bar for all and one a cell in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.federation.rounds import Metric, RoundRecord
from fedsmoothlora.runs.console import round_line

if TYPE_CHECKING:
    from fedsmoothlora.experiments.planned_runs import Cell


class CellCallback(Callback):
    """Shows one of many runs. This one shows nothing."""

    def received(self, event: Mapping[str, Any]) -> None:
        """Show an event of a run in another process: a note, or a round's metrics."""
        if "note" in event:
            self.on_note(str(event["note"]))
        else:
            metrics = [Metric(None, name, value) for name, value in event["metrics"].items()]
            self.on_round_end(RoundRecord(round=event["round"], metrics=metrics))

    def ended(self, state: str, outcome: Mapping[str, str]) -> None:
        """The run is over."""


class Display:
    """Shows all cells on a console. Use as a context manager, so that bars end when the work does."""

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

    def begin(self, cells: Sequence[Cell], waiting: Sequence[Cell]) -> None:
        """Say what there is to do."""
        done = len(cells) - len(waiting)
        self._bars.update(self._all, total=len(cells), completed=done, visible=True)
        begun = f", {done} of them done before" if done else ""
        self.say(f"{len(cells)} runs{begun}")

    @contextmanager
    def cell(self, cell: Cell) -> Iterator[CellCallback]:
        """A bar for a cell as long as it runs."""
        bar = self._bars.add_task(cell.name, total=cell.config.training.rounds, said="")
        try:
            yield _Shown(self, cell.name, cell.config.training.rounds, bar)
        finally:
            self._bars.remove_task(bar)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that people should not miss."""
        self.console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def move(self, bar: Any, round: int, said: str) -> None:
        """Move a cell's bar on."""
        self._bars.update(bar, completed=round, said=said)

    def count(self) -> None:
        """One more cell is over."""
        self._bars.advance(self._all)


class _Shown(CellCallback):
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
