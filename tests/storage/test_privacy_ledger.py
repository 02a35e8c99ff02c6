"""The ledger of private releases on disk."""

import json
from pathlib import Path

import pytest

from fedsmoothlora.errors import StateError
from fedsmoothlora.federation.accounting import Release
from fedsmoothlora.storage.privacy_ledger import StoredLedger

LINE = (
    '{"format": 1, "releases": [{"round": 1, "noise_multiplier": 1.5, "sample_rate": 1.0, "epsilon": 1.0}]}'
)


def release(round: int, epsilon: float) -> Release:
    return Release(round=round, noise_multiplier=1.5, sample_rate=0.25, epsilon=epsilon)


def test_releases_are_read_back_by_another_process(tmp_path: Path) -> None:
    path = tmp_path / "privacy.json"
    ledger = StoredLedger(path)
    assert ledger.releases == ()
    for number, one in enumerate((release(0, 0.5), release(1, 0.7), release(1, 0.9))):
        ledger.record(one)
        assert StoredLedger(path).releases[number] == one
    assert json.loads(path.read_text(encoding="utf-8"))["releases"][0] == {
        **{"round": 1, "noise_multiplier": 1.5, "sample_rate": 0.25, "epsilon": 0.5}
    }
    assert [one.name for one in tmp_path.iterdir()] == ["privacy.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 2, "releases": []}',
        '{"format": 1}',
        '{"format": 1, "releases": [{"round": 1}]}',
        LINE.replace('"round": 1', '"round": 1.0'),
        LINE.replace("1.5", "NaN"),
    ],
    ids=["empty", "cut", "list", "format", "nothing", "fields", "type", "nan"],
)
def test_a_damaged_ledger_is_an_error_and_never_a_new_start(tmp_path: Path, text: str) -> None:
    path = tmp_path / "privacy.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(StateError, match=r"privacy.json is damaged, so it is not known"):
        _ = StoredLedger(path).releases
    with pytest.raises(StateError, match="damaged"):
        StoredLedger(path).record(release(0, 1.0))
    assert path.read_text(encoding="utf-8") == text


def test_finished_rounds_must_be_in_the_ledger(tmp_path: Path) -> None:
    ledger = StoredLedger(tmp_path / "privacy.json")
    ledger.check(0)
    with pytest.raises(StateError, match=r"privacy.json is missing, and the run has finished 2 rounds"):
        ledger.check(2)
    ledger.record(release(0, 0.5))
    ledger.check(1)
    with pytest.raises(StateError, match=r"has no release of round 2, and the run has finished 2 rounds"):
        ledger.check(2)
