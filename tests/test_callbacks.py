"""Callbacks: a run notifies them of every step, in order, and of its end even if one of them raises."""

from pathlib import Path
from typing import Any

import pytest

from fedsmoothlora import run
from fedsmoothlora.callbacks import Callback, RunInfo


class Seen(Callback):
    """Keeps the events of a run; raises once a round is finished, if asked to."""

    def __init__(self, raises_after: int | None = None) -> None:
        self.events: list[tuple[str, Any]] = []
        self._raises_after = raises_after

    def on_run_begin(self, run: RunInfo) -> None:
        self.events.append(("run", (run.name, run.method, run.rounds, run.clients)))

    def on_round_begin(self, round: int, rounds: int, clients: int) -> None:
        self.events.append(("round", round))

    def on_client_end(self, client: str) -> None:
        self.events.append(("client", client))

    def on_round_end(self, record: Any) -> None:
        self.events.append(("record", record.round))
        if record.round == self._raises_after:
            raise RuntimeError("enough")

    def on_run_end(self) -> None:
        self.events.append(("end", None))


def events(rounds: int) -> list[tuple[str, Any]]:
    """The events of a run of ``toy_table`` up to that round."""
    found: list[tuple[str, Any]] = [("run", ("toy", "fedsmoothlora", 2, 3)), ("record", 0)]
    for round in range(rounds):
        found += [("round", round), *(("client", client) for client in "012"), ("record", round + 1)]
    return [*found, ("end", None)]


def test_a_callback_is_notified_of_every_step_in_order(toy_table: dict[str, Any], tmp_path: Path) -> None:
    seen = Seen()

    run(toy_table, {"training.rounds": 2}, out=tmp_path / "run", callbacks=[seen])

    assert seen.events == events(2)


def test_an_exception_of_a_callback_ends_the_run_which_can_be_resumed(
    toy_table: dict[str, Any], tmp_path: Path
) -> None:
    first, again = Seen(raises_after=1), Seen()
    with pytest.raises(RuntimeError, match="enough"):
        run(toy_table, {"training.rounds": 2}, out=tmp_path / "run", callbacks=[first])
    assert first.events == events(1)

    run(resume=tmp_path / "run", callbacks=[again])

    # The checkpoint of round 1 was not written, so that round is run again.
    assert [event for event in again.events if event[0] == "record"] == [("record", 1), ("record", 2)]
    assert again.events[-1] == ("end", None)
