"""progress.json: what it holds while a run goes on, and that it changes nothing."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsmoothlora.callbacks import Callback, RunInfo
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.runs.progress_file import ProgressFile
from fedsmoothlora.runs.session import run
from fedsmoothlora.storage.progress import MOST_IN_HAND, ClientInHand, Progress, parse_progress

INFO = RunInfo(name="toy", folder=Path(), method="fedit", rounds=3, clients=2, layers={})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "progress.json"


def callback(path: Path, *, private: bool = False) -> ProgressFile:
    """A callback whose thread writes nothing while a test goes on."""
    return ProgressFile(path, private=private, every=3_600)


def written(callback: ProgressFile, path: Path) -> Progress:
    callback.write()
    found = parse_progress(path.read_bytes())
    assert found is not None
    return found


def test_the_file_follows_the_round(path: Path) -> None:
    keeper = callback(path)
    keeper.on_run_begin(INFO)
    assert parse_progress(path.read_bytes()) is not None  # at once
    assert (written(keeper, path).round, written(keeper, path).rounds) == (None, 3)
    keeper.on_round_begin(0, 3, 2)
    keeper.on_client_begin("a", 5)
    assert written(keeper, path).in_hand == {"a": ClientInHand(step=0, steps=5)}
    keeper.on_client_step("a", 0.5)
    keeper.on_client_begin("b", 5)
    keeper.on_client_step("b", float("nan"))
    assert written(keeper, path).in_hand == {
        "a": ClientInHand(step=1, steps=5, loss=0.5),
        "b": ClientInHand(step=1, steps=5),
    }
    keeper.on_client_end("a")
    now = written(keeper, path)
    assert (now.round, now.clients, now.done, now.training) == (1, 2, 1, 1)
    keeper.on_round_end(RoundRecord(round=1, metrics=[]))
    assert (written(keeper, path).round, written(keeper, path).in_hand) == (None, {})
    keeper.on_run_end()
    assert list(path.parent.iterdir()) == []
    keeper.on_run_end()


def test_the_thread_writes_the_file_and_ends_with_the_run(path: Path) -> None:
    keeper = ProgressFile(path, every=0.001)
    keeper.on_run_begin(INFO)
    keeper.on_round_begin(1, 3, 2)
    while (now := parse_progress(path.read_bytes())) is None or now.round != 2:
        pass
    keeper.on_run_end()
    assert list(path.parent.iterdir()) == []


def test_a_thousand_clients_make_no_long_file(path: Path) -> None:
    keeper = callback(path)
    keeper.on_round_begin(0, 3, 1_000)
    for number in range(100):
        keeper.on_client_begin(str(number), 5)
    now = written(keeper, path)
    assert (now.training, len(now.in_hand)) == (100, MOST_IN_HAND)


def test_a_private_run_tells_only_its_round(path: Path) -> None:
    keeper = callback(path, private=True)
    keeper.on_round_begin(1, 3, 2)
    keeper.on_client_begin("zoe", 5)
    keeper.on_client_step("zoe", 0.5)
    keeper.on_client_end("zoe")
    now = written(keeper, path)
    assert now == Progress(written=now.written, rounds=3, round=2)


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "no-folder" / "progress.json", tmp_path / "folder"):
        keeper = callback(path)
        keeper.on_run_begin(INFO)
        keeper.write()
        keeper.on_run_end()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"written": 1}', b'{"written": "x", "rounds": 1}', b"\xff", b"[" * 9_000],
    ids=range(7),
)
def test_a_damaged_file_is_no_progress(content: bytes) -> None:
    assert parse_progress(content) is None


class Look(Callback):
    def __init__(self, folder: Path) -> None:
        self.path = folder / "progress.json"
        self.found: list[bool] = []

    def on_client_begin(self, client: str, steps: int) -> None:
        self.found.append(self.path.exists())


def test_a_run_has_the_file_until_it_ends(toy_table: dict[str, Any], tmp_path: Path) -> None:
    look = Look(tmp_path / "run")
    toy_table["training"] |= {"rounds": 2, "steps": 1}
    run(toy_table, out=tmp_path / "run", console=Console(quiet=True), callbacks=[look], outputs=False)
    assert look.found == [True] * 6
    assert not look.path.exists()
