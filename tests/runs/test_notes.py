"""Notes that repeat become one, with their count."""

import io
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.runs.notes import FoldedNotes, kind
from fedsmoothlora.runs.session import run


class Heard(Callback):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.ended = 0

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def on_run_end(self) -> None:
        self.ended = len(self.notes)


def test_a_note_is_passed_on_at_once_and_its_repetitions_are_counted_at_the_end() -> None:
    heard = Heard()
    folded = FoldedNotes([heard])
    for round in range(3):
        for client in ("north", "south wing"):
            folded.on_client_begin(client, 1)
            folded.on_note(f"client {client} diverged in round {round + 1} and is left out: the loss is nan")
    folded.on_note("something else")
    first = "client north diverged in round 1 and is left out: the loss is nan"
    assert heard.notes == [first, "something else"]
    folded.on_run_end()
    assert heard.notes[2:] == [f"6 notes of this kind in all, about 2 clients (north, south wing): {first}"]
    assert heard.ended == 3  # before the callbacks' own end
    folded.on_run_end()
    assert len(heard.notes) == 3


@given(st.lists(st.sampled_from(["x", "y 1", "y 2", "client a: z", "client b.0: z"]), max_size=20))
def test_every_note_is_passed_on_or_counted(notes: list[str]) -> None:
    heard = Heard()
    folded = FoldedNotes([heard])
    for note in notes:
        folded.on_note(note)
    shown = list(heard.notes)
    folded.on_run_end()
    counts = [int(line.partition(" ")[0]) for line in heard.notes[len(shown) :]]
    alone = len(shown) - len(counts)
    assert alone + sum(counts) == len(notes)
    assert len(set(map(kind, shown))) == len(shown)


def test_different_reasons_are_different_kinds() -> None:
    assert kind("client a: the loss is nan at step 3") == kind("client b.c: the loss is nan at step 12")
    assert kind("client a: the loss is nan") != kind("client a: the norm is nan")
    assert kind("layer vit.layers.0.q: 1.5e-3 left") == kind("layer vit.layers.11.v: 2 left")


def test_too_few_directions_are_told_once_with_their_count_and_the_keys(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    said = io.StringIO()
    changes = {"lora.r": 16, "training.batch_size": 1, "method.calibration_batches": 1, "training.steps": 1}
    changes |= {"training.rounds": 2, "training.lr": 1e-4, "data.test_rows": 8}
    run(
        read(toy_table, changes),
        out=tmp_path / "run",
        console=Console(file=said, width=400),
        outputs=False,
    )
    lines = [line for line in said.getvalue().splitlines() if "no gradient-aligned start" in line]
    logged = [
        line
        for line in (tmp_path / "run" / "run.log").read_text().splitlines()
        if "no gradient-aligned start" in line
    ]
    assert len(lines) == len(logged) == 2
    assert lines[1].startswith("6 notes of this kind in all, about 3 clients (0, 1, 2): client ")
    assert "lora.r" in lines[0]
    assert "method.calibration_batches = 1" in lines[0]


def test_every_refused_upload_is_shown() -> None:
    shown: list[str] = []

    class Shown(Callback):
        def on_note(self, text: str) -> None:
            shown.append(text)

    folded = FoldedNotes([Shown()])
    texts = [f"round {round}: upload refused: client b: it names client 'a'" for round in (1, 2, 3)]
    for text in texts:
        folded.on_note(text)
    folded.on_run_end()

    assert shown == texts
