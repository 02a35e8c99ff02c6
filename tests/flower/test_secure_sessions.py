"""A site's states of secure aggregation: for their owner alone, each used once, no round summed twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

pytest.importorskip("flwr")

from fedsmoothlora.errors import SecureAggregationError, StateError
from fedsmoothlora.flower.secure_sessions import SecureSessions
from fedsmoothlora.secure_aggregation import site
from fedsmoothlora.secure_aggregation.messages import Session
from fedsmoothlora.secure_aggregation.site import Advertised, MaskSent

CLIENTS = ("a", "b", "c")


def session(round: int, attempt: int = 0) -> Session:
    return Session(run="1", round=round, attempt=attempt, clients=CLIENTS, threshold=2)


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
    sessions.begin(session(3))


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    sessions = SecureSessions(tmp_path)
    sessions.begin(session(0))
    (tmp_path / "last.json").write_text("{}}")
    with pytest.raises(StateError, match=r"last\.json is damaged"):
        sessions.begin(session(1))
