"""Sums of masked uploads on disk: an attempt is begun once, and a sum is the same when it is read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedsmoothlora.errors import StateError
from fedsmoothlora.federation.simulation import BegunSum, KeptSum, MemorySums, Sums
from fedsmoothlora.storage import sums as stored_sums
from fedsmoothlora.storage.sums import StoredSums

BEGUN = BegunSum(
    round=3,
    exchange=0,
    attempt=1,
    asked=("a", "b", "c"),
    sent=12,
    epsilons={"a": 0.1},
    transcript=b"\x00\xff",
)
KEPT = KeptSum(
    **{"round": 3, "exchange": 0, "attempt": 1, "asked": ("a", "b", "c"), "summed": ("a", "c")},
    **{"refused": 1, "sent": 12, "epsilons": {"a": 0.1}, "numbers": np.array([1, 2**32 - 1], "<u4")},
)


@pytest.fixture(params=["disk", "memory"])
def sums(request: pytest.FixtureRequest, tmp_path: Path) -> Sums:
    return StoredSums(tmp_path / "sums", "1") if request.param == "disk" else MemorySums()


def test_no_attempt_is_begun_twice(sums: Sums) -> None:
    asked = [(0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 0), (1, 0)]
    assert [sums.begin(*one) for one in asked] == [0, 1, 0, 1, 0, 1, 2]


def test_sessions_and_sums_are_read_as_they_were_stored(sums: Sums) -> None:
    assert sums.load(3, 0) is None
    assert sums.begun(3, 0) is None
    sums.begin(3, 0)
    sums.keep_begun(BEGUN)
    sums.keep(KEPT)
    assert sums.begun(3, 0) == BEGUN
    assert sums.begun(3, 1) is None
    found = sums.load(3, 0)
    assert found is not None
    assert (found.numbers == KEPT.numbers).all()
    assert replace(found, numbers=KEPT.numbers) == KEPT
    assert sums.load(3, 1) is None
    assert sums.load(2, 0) is None


def test_damaged_files_and_those_of_another_run_are_named(tmp_path: Path) -> None:
    sums = StoredSums(tmp_path, "1")
    sums.begin(3, 0)
    sums.keep(KEPT)
    with pytest.raises(StateError, match=r"0004-0\.json belongs to another run"):
        StoredSums(tmp_path, "2").load(3, 0)
    (tmp_path / "0004-0").write_bytes(bytes(8))
    with pytest.raises(StateError, match="0004-0 is truncated or was altered"):
        sums.load(3, 0)
    (tmp_path / "attempts.json").write_text("{}")
    with pytest.raises(StateError, match=r"attempts\.json is truncated"):
        sums.begin(3, 0)


def test_a_crash_between_the_two_files_of_a_session_keeps_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, table: object) -> None:
        raise KeyboardInterrupt

    sums = StoredSums(tmp_path, "1")
    sums.begin(3, 0)
    sums.keep_begun(BEGUN)
    other = replace(BEGUN, round=4, transcript=b"other")
    with monkeypatch.context() as patched:
        patched.setattr(stored_sums, "write_hashed_json", killed)
        with pytest.raises(KeyboardInterrupt):
            sums.keep_begun(other)
    again = StoredSums(tmp_path, "1")
    assert again.begun(4, 0) is None  # no site of it has revealed anything
    assert again.begun(3, 0) == BEGUN
    again.keep_begun(other)
    assert again.begun(4, 0) == other
    assert len(list(tmp_path.glob("begun-*"))) == 1
