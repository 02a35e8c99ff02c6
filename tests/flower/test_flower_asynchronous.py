"""Asynchronous rounds with sites: real arrivals are recorded, and repeated in one process to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.flower.server_app import check_for_sites
from tests.flower.test_flower_engine import Answer, DirectGrid, Setting, metrics, setting

__all__ = ["setting"]  # the fixture

BUFFERED: dict[str, Any] = {"participation.buffer": 2, "training.rounds": 4, "flower.timeout": 60.0}


class Later:
    """A node whose replies arrive after another node has answered so many times more."""

    def __init__(self, grid: DirectGrid, slow: int, other: int, answers: int) -> None:
        self.grid, self.answers, self.count = grid, answers, 0
        self.held: dict[str, Message] = {}
        grid.stand_in |= {slow: self._hold, other: self._release}

    def _hold(self, message: Message, context: Context, app: Answer) -> Message | None:
        reply = app(message, context)
        if message.metadata.message_type != "train":
            return reply
        self.held[message.metadata.message_id] = reply
        return None

    def _release(self, message: Message, context: Context, app: Answer) -> Message:
        self.count += message.metadata.message_type == "train"
        if self.count % self.answers == 0:
            self.grid.answered |= self.held
            self.held.clear()
        return app(message, context)


def record_of(folder: Path) -> list[Any]:
    rounds: list[Any] = json.loads((folder / "arrivals.json").read_text())["rounds"]
    return rounds


def updates(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "updates").iterdir())]


@pytest.mark.parametrize("method", [pytest.param("fedsmoothlora", marks=pytest.mark.slow), "fedit"])
def test_late_sites_are_merged_later_and_one_process_repeats_the_run(setting: Setting, method: str) -> None:
    if method == "fedit":
        setting.table["method"] = {"name": "fedit"}
    grid = setting.grid(BUFFERED)
    Later(grid, slow=11, other=12, answers=3)
    folder = setting.coordinate(grid)
    rounds = record_of(folder)
    assert [len(one["merged"]) for one in rounds] == [2] * 4
    ages = [t - began for t, one in enumerate(rounds, 1) for _, began in one["merged"]]
    assert max(ages) >= 1
    assert metrics(folder)[4, None, "staleness_max"] == max(4 - began for _, began in rounds[3]["merged"])

    again = setting.in_process({**BUFFERED, "participation.replay": str(folder)})
    assert updates(again) == updates(folder)
    assert record_of(again) == rounds
    repeated = metrics(again)
    assert metrics(folder) == {key: repeated[key] for key in repeated if key[2] != "simulated_time"}


def test_a_site_that_dies_makes_room_for_another_one(setting: Setting) -> None:
    # With one client at a time, no round can end before the dead site's time is over.
    grid = setting.grid(
        {**BUFFERED, "participation.clients": 1, "participation.buffer": 1, "flower.timeout": 1.0}
    )

    def dead(message: Message, context: Context, app: Answer) -> Message | None:
        return None if message.metadata.message_type == "train" else app(message, context)

    grid.stand_in[11] = dead
    folder = setting.coordinate(grid)
    rounds = record_of(folder)
    assert [len(one["merged"]) for one in rounds] == [1, 1, 1, 1]
    assert "hospital-b" not in {client for one in rounds for client, _ in one["merged"]}
    assert "client hospital-b did not reply within 1 s (flower.timeout)" in (folder / "run.log").read_text()
    assert any(event[:2] == ["fail", "hospital-b"] for one in rounds for event in one["events"])


@pytest.mark.slow
def test_a_resumed_coordinator_counts_sites_in_flight_as_failed_and_goes_on(setting: Setting) -> None:
    grid = setting.grid(BUFFERED)
    late = Later(grid, slow=11, other=12, answers=100)
    folder = setting.coordinate(grid)
    for path in (folder / "checkpoints").glob("0004*"):
        path.unlink()
    assert json.loads((folder / "checkpoints" / "0003.json").read_text())["in_flight"]["clients"]
    late.answers = 1
    setting.coordinate(grid, resume=True)
    rounds = record_of(folder)
    assert len(rounds) == 4
    assert [event[:2] for event in rounds[3]["events"]].count(["fail", "hospital-b"]) == 1
    again = setting.in_process({**BUFFERED, "participation.replay": str(folder)})
    assert updates(again) == updates(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"participation.speeds": "uniform"}, r"participation\.speeds = 'uniform': sites are as fast"),
        ({"participation.replay": "runs/x"}, r"participation\.replay = .*`fedsmoothlora run`"),
        ({"data.validation": 0.2}, r"data\.validation = 0\.2 with participation\.buffer = 2"),
    ],
    ids=["speeds", "replay", "validation"],
)
def test_what_sites_cannot_do_is_refused(setting: Setting, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_for_sites(read(setting.table, {**BUFFERED, **changes}))
