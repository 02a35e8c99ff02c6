"""The messages of a run on a console, with progress bars if it is a terminal."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedsmoothlora.callbacks import Callback, RunInfo
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.methods import Layer
from fedsmoothlora.printable import counted
from fedsmoothlora.reports.formats import readable_bytes
from fedsmoothlora.reports.metrics import HIGHLIGHTS

# `fedsmoothlora.logs` does not repeat these messages on standard error: the console shows them.
_log = logging.getLogger("fedsmoothlora.run")


class ConsoleCallback(Callback):
    """Shows a run on a console. In a terminal, there are bars for rounds, clients and steps, with the loss.

    Args:
        console: the console.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._total_rounds = 0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._rounds = self._progress.add_task("rounds", total=None, visible=False, loss="")
        self._clients = self._progress.add_task("round", total=None, visible=False, loss="")
        self._visits: dict[str, TaskID] = {}

    def on_run_begin(self, run: RunInfo) -> None:
        """Start the bars, and print method, clients, rounds and every adapted layer."""
        self._total_rounds = run.rounds
        self._progress.start()
        self._say(
            f"{run.name}: {run.method}, {counted(run.clients, 'client')}, {counted(run.rounds, 'round')}, "
            f"{len(run.layers)} adapted layers; in {run.folder}"
        )
        for name, alike in by_pattern(run.layers).items():
            layer = alike[0]
            count = f"{len(alike)} layers " if len(alike) > 1 else ""
            self._say(
                f"  LoRA rank {layer.rank} on {count}{name} ({layer.m} x {layer.n}), scale {layer.scale:g}"
            )
        if run.head:
            self._say(f"  trained whole: {', '.join(run.head)}")

    def on_run_end(self) -> None:
        """End the bars."""
        self._progress.stop()

    def on_round_begin(self, round: int, rounds: int, clients: int) -> None:
        """Move the bar of rounds on and begin a new bar of clients."""
        self._progress.update(self._rounds, total=rounds, completed=round, visible=True)
        self._progress.reset(
            self._clients, total=clients, visible=True, description=f"round {round + 1}", loss="clients"
        )

    def on_client_begin(self, client: str, steps: int) -> None:
        """Begin a new bar of steps; there is one for every client that is training."""
        self._visits[client] = self._progress.add_task(f"client {client}", total=steps, loss="starting")

    def on_client_step(self, client: str, loss: float) -> None:
        """Move the client's bar on."""
        self._progress.update(self._visits[client], advance=1, loss=f"loss {loss:.4f}")

    def on_client_end(self, client: str) -> None:
        """Count the client."""
        visit = self._visits.pop(client, None)
        if visit is not None:
            self._progress.remove_task(visit)
        self._progress.update(self._clients, advance=1)

    def on_note(self, text: str) -> None:
        """Print a sentence above the bars, and log it."""
        _log.warning(text)
        self.console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def on_round_end(self, record: RoundRecord) -> None:
        """Print the quality of the global model, the bytes that were sent, and the seconds."""
        self._say(round_line(record, self._total_rounds))

    def _say(self, text: str) -> None:
        """Print a plain sentence, and log it."""
        _log.info(text)
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def by_pattern(layers: Mapping[str, Layer]) -> dict[str, list[Layer]]:
    """Layers that differ only in their block, under one name with ``*`` for the block's number."""
    found: dict[tuple[str, int, int, int, float], list[Layer]] = {}
    for layer in layers.values():
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", layer.name)
        found.setdefault((pattern, layer.m, layer.n, layer.rank, layer.scale), []).append(layer)
    # Layers of one pattern but several shapes keep their own names, since the result has unique keys.
    counts = Counter(pattern for pattern, *_ in found)
    shown: dict[str, list[Layer]] = {}
    for (pattern, *_), alike in found.items():
        if len(alike) > 1 and counts[pattern] == 1:
            shown[pattern] = alike
        else:
            shown |= {layer.name: [layer] for layer in alike}
    return shown


def round_line(record: RoundRecord, rounds: int) -> str:
    """One line about a round, for instance ``round 3/10  accuracy 0.9120  loss 0.3021  up 4.6 MB ...``."""
    words = [f"round {record.round:>{len(str(rounds))}}/{rounds}"]
    for name in (*HIGHLIGHTS, "loss"):
        value = record.value(name)
        if value is not None:
            words.append(f"{name.replace('_', ' ')} {value:.4f}")
    up, down, seconds = record.value("bytes_up"), record.value("bytes_down"), record.value("seconds_round")
    if up is not None and down is not None:
        words += [f"up {readable_bytes(up)}", f"down {readable_bytes(down)}"]
    if seconds is not None:
        words.append(f"{seconds:.1f} s")
    else:
        words.append("before any training")
    if (epsilon := record.value("epsilon")) is not None:
        words.append(f"epsilon {epsilon:.4g}")
    if record.value("seeded_noise") is not None:
        words.append("(not private: seeded noise)")
    if record.value("mean_of_clients") is not None:
        words.append("(mean of the clients' models)")
    return "  ".join(words)
