"""A site's states of secure aggregation: for their owner alone, each used once, no round summed twice."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from threading import Barrier, Thread
from time import sleep
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

pytest.importorskip("flwr")

from fedsmoothlora.errors import SecureAggregationError, StateError
from fedsmoothlora.flower import secure_sessions
from fedsmoothlora.flower.secure_sessions import SecureSessions
from fedsmoothlora.secure_aggregation import site
from fedsmoothlora.secure_aggregation.messages import Session
from fedsmoothlora.secure_aggregation.site import Advertised, MaskSent

CLIENTS = ("a", "b", "c")


def session(round: int, attempt: int = 0, exchange: Any = 0) -> Session:
    return Session(run="1", round=round, attempt=attempt, exchange=exchange, clients=CLIENTS, threshold=2)


def a_state(round: int = 0) -> Advertised:
    return site.advertise(session(round), "a", ec.generate_private_key(ec.SECP384R1()), 2)[0]


def test_a_state_is_taken_once(tmp_path: Path) -> None:
    sessions, state = SecureSessions(tmp_path / "secure"), a_state()
    sessions.begin(session(0))
    sessions.keep(state)
    assert SecureSessions(tmp_path / "secure").take(Advertised) == state  # another process
    with pytest.raises(SecureAggregationError, match="is over or has not begun"):
        sessions.take(Advertised)


def test_a_stage_cannot_be_left_out(tmp_path: Path) -> None:
    sessions = SecureSessions(tmp_path)
    with pytest.raises(SecureAggregationError, match="has not begun"):
        sessions.take(Advertised)
    sessions.begin(session(0))
    sessions.keep(a_state())
    with pytest.raises(SecureAggregationError, match="has not begun"):
        sessions.take(MaskSent)
    with pytest.raises(
        SecureAggregationError, match="is over"
    ):  # a coordinator that tries has ended the session
        sessions.take(Advertised)


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        sessions = SecureSessions(tmp_path / "secure")
        sessions.begin(session(0))
        sessions.keep(a_state())
        sessions.keep(a_state())
    finally:
        os.umask(before)
    files = list((tmp_path / "secure").iterdir())
    assert len(files) == 2
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_a_session_is_later_than_all_before_it(tmp_path: Path) -> None:
    sessions = SecureSessions(tmp_path)
    for one in (session(0), session(0, 1), session(3), session(3, 4), session(5)):
        sessions.begin(one)
    for again in (session(5), session(3, 5), session(0)):
        with pytest.raises(SecureAggregationError, match="has taken part in attempt 0 of round 5"):
            sessions.begin(again)


def test_a_new_session_forgets_the_state_of_the_one_before(tmp_path: Path) -> None:
    sessions = SecureSessions(tmp_path)
    sessions.begin(session(0))
    sessions.keep(a_state())
    sessions.begin(session(0, 1))
    with pytest.raises(SecureAggregationError, match="has not begun"):
        sessions.take(Advertised)


def test_a_round_in_which_shares_were_revealed_has_no_second_sum(tmp_path: Path) -> None:
    sessions = SecureSessions(tmp_path)
    sessions.begin(session(2))
    sessions.end(session(2))
    with pytest.raises(SecureAggregationError, match="another sum of round 2"):
        SecureSessions(tmp_path).begin(session(2, 1))
    sessions.begin(session(2, exchange=1))
    with pytest.raises(SecureAggregationError, match="taken part in attempt 0 of round 2"):
        sessions.begin(session(2, 1))
    sessions.begin(session(2, 1, exchange=1))
    sessions.end(session(2, 1, exchange=1))
    with pytest.raises(SecureAggregationError, match="another sum of round 2"):
        sessions.begin(session(2, 2, exchange=1))
    sessions.begin(session(3))


def test_masks_are_for_the_sum_of_their_session(tmp_path: Path) -> None:
    sessions = SecureSessions(tmp_path)
    sessions.begin(session(2, 5))
    sessions.expect(2, 0)
    for round, exchange in ((1, 0), (2, 1), (3, 0)):
        with pytest.raises(SecureAggregationError, match="in a session of exchange 0 of round 2"):
            sessions.expect(round, exchange)


def test_a_state_that_gives_the_same_answer_every_time_may_be_used_again(tmp_path: Path) -> None:
    sessions, state = SecureSessions(tmp_path), a_state()
    sessions.begin(session(0))
    sessions.keep(state)
    for _ in range(2):
        assert sessions.take(Advertised, again=True) == state


def test_two_messages_at_once_use_one_state_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four threads take the state at the same time. Reading is slow, so all read before one deletes it."""
    sessions, found = SecureSessions(tmp_path), list[Advertised]()
    sessions.begin(session(0))
    sessions.keep(a_state())
    barrier = Barrier(4)

    def slow(path: Path) -> bytes:
        data = path.read_bytes()
        sleep(0.05)
        return data

    def take() -> None:
        own = SecureSessions(tmp_path)
        barrier.wait()
        with own.locked(), suppress(SecureAggregationError):
            found.append(own.take(Advertised))

    monkeypatch.setattr(secure_sessions, "read_bytes", slow)
    threads = [Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    sessions = SecureSessions(tmp_path)
    sessions.begin(session(0))
    (tmp_path / "last.json").write_text("{}}")
    with pytest.raises(StateError, match=r"last\.json is damaged"):
        sessions.begin(session(1))
