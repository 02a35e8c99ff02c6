"""A process that runs cells: one JSON line a cell on standard input, what happens as JSON lines on output."""

from __future__ import annotations

import io
import json
import os
import sys
from typing import Any

from rich.console import Console

from fedsmoothlora.comparison.cells import cell_from_task, run_cell
from fedsmoothlora.comparison.display import CellWatcher
from fedsmoothlora.errors import InterruptedRunError
from fedsmoothlora.rounds import RoundRecord


class TellingWatcher(CellWatcher):
    """Tells the process that waits of every round."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO(), quiet=True))

    def note(self, text: str) -> None:
        """Log it, and tell it."""
        super().note(text)
        tell({"note": text})

    def record(self, record: RoundRecord, rounds: int) -> None:
        """Log the round, and tell its figures of the global model."""
        super().record(record, rounds)
        figures = {figure.name: figure.value for figure in record.figures if figure.client is None}
        tell({"round": record.round, "rounds": rounds, "figures": figures})


def tell(event: dict[str, Any]) -> None:
    """One line; a process that nobody listens to any more ends."""
    try:
        _out.write(json.dumps(event) + "\n")
        _out.flush()
    except BrokenPipeError:
        os._exit(1)


def main() -> None:
    """Run cells until there are no more."""
    for line in sys.stdin:
        try:
            state: str = run_cell(cell_from_task(json.loads(line)), TellingWatcher())
        except InterruptedRunError:
            tell({"state": "interrupted"})
            return
        tell({"state": state})


# What libraries print must not come between the lines.
_out = sys.stdout

if __name__ == "__main__":
    sys.stdout = sys.stderr
    main()
