"""Metrics that are appended while they are read: half lines, cut files, and flat memory."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.reports import following
from fedsmoothlora.reports.following import MOST_ROUNDS, FollowedMetrics, newest_metrics
from fedsmoothlora.reports.reading import read_metrics


def line(round: int, name: str, value: object, client: str | None = None) -> bytes:
    return json.dumps({"round": round, "client": client, "name": name, "value": value}).encode() + b"\n"


def test_a_half_line_counts_when_its_end_is_written() -> None:
    followed, whole = FollowedMetrics(), line(0, "accuracy", 0.25) + line(1, "accuracy", 0.5)
    followed.read(io.BytesIO(whole[:-5]))
    assert followed.metrics.server == {"accuracy": {0: 0.25}}
    followed.read(io.BytesIO(whole))
    assert followed.metrics.server == {"accuracy": {0: 0.25, 1: 0.5}}
    assert followed.metrics.unreadable == 0


LINES = st.lists(
    st.one_of(
        st.builds(
            line,
            st.integers(0, 5),
            st.sampled_from(["accuracy", "bytes_up", "of the user's own"]),
            st.floats(0, 9) | st.integers(0, 9),
        ),
        st.sampled_from([b"\n", b"{\n", b"[1]\n", b"null\n", b"\xff\xfe\n", b"[" * 5_000 + b"\n", b"1,2\n"]),
    ),
    max_size=12,
)


@given(LINES, st.data())
def test_metrics_do_not_depend_on_when_the_file_is_read(lines: list[bytes], data: st.DataObject) -> None:
    whole, followed = b"".join(lines), FollowedMetrics()
    for end in sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5))):
        followed.read(io.BytesIO(whole[:end]))
    followed.read(io.BytesIO(whole))
    at_once = FollowedMetrics()
    at_once.read(io.BytesIO(whole))
    assert followed.metrics == at_once.metrics


def test_metrics_are_those_of_the_report(tmp_path: Path) -> None:
    path = Path(__file__).parents[1] / "recorded" / "whole"
    followed, report = FollowedMetrics(), read_metrics(path)
    with (path / "metrics.jsonl").open("rb") as file:
        followed.read(file)
    assert followed.metrics.server == report.server
    for name, by_client in report.clients.items():
        for client, series in by_client.items():
            (last,) = followed.metrics.clients[name][client]
            assert last == max(series)


@pytest.mark.parametrize("longer", [False, True])
def test_a_resumed_run_that_cut_the_file_is_read_again(longer: bool) -> None:
    followed = FollowedMetrics()
    followed.read(io.BytesIO(b"".join(line(k, "loss", 2.0) for k in range(9))))
    again = line(0, "loss", 2.0) + line(1, "loss", 1.0) * (30 if longer else 1)
    followed.read(io.BytesIO(again))
    assert followed.metrics.server == {"loss": {0: 2.0, 1: 1.0}}


def test_memory_is_flat_over_a_long_run() -> None:
    rounds = 3 * MOST_ROUNDS
    whole = b"".join(
        line(k, "loss", 1 / (k + 1)) + line(k, "bytes_up", 10) + line(k, "bytes_up", 5, "client")
        for k in range(rounds)
    )
    followed = FollowedMetrics()
    for end in range(0, len(whole), 200_000):
        followed.read(io.BytesIO(whole[:end]))
    followed.read(io.BytesIO(whole))
    server = followed.metrics.server
    assert max(map(len, server.values())) <= MOST_ROUNDS
    assert server["loss"][rounds - 1] == 1 / rounds
    assert server["loss"][0] == 1
    assert sum(server["bytes_up"].values()) == 10 * rounds
    assert followed.metrics.clients == {"bytes_up": {"client": {rounds - 1: 5.0 * rounds}}}


def test_a_line_without_an_end_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_BLOCK", 1_000)
    followed = FollowedMetrics()
    followed.read(io.BytesIO(b"x" * 5_500 + b"\n" + line(0, "loss", 2.0)))
    assert followed.metrics.server == {"loss": {0: 2.0}}
    assert followed.metrics.unreadable > 0


def test_the_newest_metrics_come_from_the_end_of_the_file() -> None:
    whole = b"".join(line(k, "loss", k) for k in range(5_000))
    metrics = newest_metrics(io.BytesIO(whole + b'{"round": 5000, "cl'))
    assert metrics.rounds == 4_999
    assert metrics.unreadable == 0
    assert len(metrics.server["loss"]) < 2_000
    assert newest_metrics(io.BytesIO(b"")).server == {}
    assert newest_metrics(io.BytesIO(line(0, "loss", 1))).server == {"loss": {0: 1.0}}
