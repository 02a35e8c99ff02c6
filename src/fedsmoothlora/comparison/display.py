"""What people see while cells run: a bar for all and one a cell in a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedsmoothlora.progress import ConsoleWatcher, round_line
from fedsmoothlora.rounds import Figure, RoundRecord

if TYPE_CHECKING:
    from fedsmoothlora.comparison.cells import Cell


class CellWatcher(ConsoleWatcher):
    """Watches one cell: what it says goes to its ``run.log``, and nothing to a console."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console or Console(file=io.StringIO(), quiet=True))

    def heard(self, event: Mapping[str, Any]) -> None:
        """Something that another process tells of this cell, and has logged: a note, or a round's figures."""
        if "note" in event:
            self.show_note(str(event["note"]))
        else:
            figures = [Figure(None, name, value) for name, value in event["figures"].items()]
            self.show_record(RoundRecord(round=event["round"], figures=figures), event["rounds"])

    def show_note(self, text: str) -> None:
        """Show a note."""

    def show_record(self, record: RoundRecord, rounds: int) -> None:
        """Show a round."""

    def ended(self, state: str, outcome: Mapping[str, str]) -> None:
        """The cell is over."""


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
    def cell(self, cell: Cell) -> Iterator[CellWatcher]:
        """A bar for a cell as long as it runs."""
        bar = self._bars.add_task(cell.name, total=cell.config.training.rounds, said="")
        try:
            yield _Shown(self, cell.name, bar)
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


class _Shown(CellWatcher):
    def __init__(self, display: Display, name: str, bar: Any) -> None:
        super().__init__()
        self._display, self._name, self._bar = display, name, bar
        self._last = ""

    def note(self, text: str) -> None:
        super().note(text)
        self.show_note(text)

    def record(self, record: RoundRecord, rounds: int) -> None:
        super().record(record, rounds)
        self.show_record(record, rounds)

    def show_note(self, text: str) -> None:
        self._display.warn(f"{self._name}: {text}")

    def show_record(self, record: RoundRecord, rounds: int) -> None:
        self._last = round_line(record, rounds)
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
