"""Without a terminal, a line says how far a round is."""

import io
import time
from pathlib import Path

from rich.console import Console

from fedsmoothlora.callbacks import RunInfo
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.runs.progress_lines import ProgressLines

RUN = RunInfo(name="x", folder=Path("x"), method="fedit", rounds=3, clients=2, layers={})


def test_a_line_names_round_clients_and_steps() -> None:
    lines = ProgressLines(Console(file=io.StringIO()))
    assert lines.line().startswith("before round 1, ")
    lines.on_round_begin(1, 3, 2)
    lines.on_client_begin("a", 20)
    assert lines.line().endswith("0 of 2 clients; client a: starting")
    lines.on_client_step("a", 0.5)
    lines.on_client_step("a", 0.25)
    assert lines.line().startswith("round 2/3, ")
    assert lines.line().endswith("client a: step 2 of 20, loss 0.2500")
    lines.on_client_end("a")
    assert lines.line().endswith(": 1 of 2 clients")
    lines.on_round_end(RoundRecord(round=2, metrics=[]))
    assert lines.line().startswith("after round 2, ")


def test_lines_come_in_a_long_step_and_not_after_other_output() -> None:
    said = io.StringIO()
    lines = ProgressLines(Console(file=said), every=0.2)
    lines.on_run_begin(RUN)
    lines.on_round_begin(0, 3, 2)
    for _ in range(6):  # other output, more often than that
        time.sleep(0.05)
        lines.on_note("a note")
    before = said.getvalue()
    time.sleep(0.7)  # one long step
    lines.on_run_end()
    written = said.getvalue().removeprefix(before).splitlines()
    assert 1 <= len(written) <= 4
    assert all(line.startswith("round 1/3, ") for line in written)
    time.sleep(0.3)
    assert said.getvalue().splitlines()[-len(written) :] == written


def test_the_end_of_a_run_that_never_began_is_no_error() -> None:
    ProgressLines(Console(file=io.StringIO())).on_run_end()
