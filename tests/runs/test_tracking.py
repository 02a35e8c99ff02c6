import json
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fedsmoothlora.config.settings import TrackingSettings
from fedsmoothlora.errors import TrackingError
from fedsmoothlora.federation.records import Metric, RoundRecord
from fedsmoothlora.runs.trackers import trackers

CONFIG = 'name = "toy"\n\n[training]\nrounds = 3\nlr = 0.02\n'
BLOCK = 32768
OFFLINE_RUN = """
import sys
from pathlib import Path
from fedsmoothlora.federation.records import Metric, RoundRecord
from fedsmoothlora.runs.trackers import trackers
from fedsmoothlora.config.settings import TrackingSettings

(tracker,) = trackers(TrackingSettings(wandb=True), Path(sys.argv[1]), "", "toy")
tracker.on_round_end(RoundRecord(round=0, metrics=[Metric(None, "accuracy", 0.5)]))
tracker.on_run_end()
"""


def need(library: str) -> None:
    """Skip where an extra is not installed; in CI, that is a failure."""
    if find_spec(library) is None:
        text = f"{library} is not installed: pip install 'fedsmoothlora[{library}]'"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)


def record(round: int, accuracy: float) -> RoundRecord:
    return RoundRecord(
        round=round,
        metrics=[
            Metric(None, "accuracy", accuracy),
            Metric("0", "train_loss", 1.0 - accuracy),
            Metric("7", "train_loss", 2.0 - accuracy),
        ],
    )


def expected(round: int, accuracy: float) -> dict[str, float]:
    return {
        "accuracy": accuracy,
        "client/0/train_loss": 1.0 - accuracy,
        "client/7/train_loss": 2.0 - accuracy,
    }


def follow(settings: TrackingSettings, folder: Path, *records: RoundRecord, killed: bool = False) -> None:
    """What a run does with its trackers."""
    (tracker,) = trackers(settings, folder, CONFIG, "toy")
    for one in records:
        tracker.on_round_end(one)
    if not killed:
        tracker.on_run_end()


def test_nothing_is_tracked_by_default(tmp_path: Path) -> None:
    assert trackers(TrackingSettings(), tmp_path, CONFIG, "toy") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["tensorboard", "wandb"])
def test_a_missing_extra_is_an_error_that_names_key_and_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, key, None)
    with pytest.raises(TrackingError) as error:
        trackers(TrackingSettings(tensorboard=True, wandb=True), tmp_path, CONFIG, "toy")
    assert f"tracking.{key} = true" in str(error.value)
    assert f"pip install 'fedsmoothlora[{key}]'" in str(error.value)
    assert list(tmp_path.iterdir()) == []


class Failing:
    """A writer on a full disk."""

    def __init__(self, *arguments: object, **options: object) -> None:
        self.calls = 0

    def on_round_end(self, record: RoundRecord) -> None:
        self.calls += 1
        if record.round > 0:
            raise OSError(28, "No space left on device")

    def on_run_end(self) -> None:
        self.calls += 1
        raise OSError(28, "No space left on device")


def test_a_tracker_that_fails_is_noted_once_and_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    need("tensorboard")
    failing = Failing()
    monkeypatch.setattr("fedsmoothlora.runs.trackers._TensorBoard", lambda *arguments: failing)
    monkeypatch.setattr("fedsmoothlora.runs.trackers._require", lambda key: None)
    with caplog.at_level(logging.INFO, "fedsmoothlora"):
        follow(TrackingSettings(tensorboard=True), tmp_path, *(record(t, 0.5) for t in range(4)))
    assert failing.calls == 3, "two records and the attempt to close; nothing after the failure"
    (note,) = caplog.messages
    assert "TensorBoard failed (round 1)" in note
    assert "No space left on device" in note
    assert "metrics.jsonl" in note


def test_a_tracker_that_cannot_be_closed_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fedsmoothlora.runs.trackers._TensorBoard", Failing)
    monkeypatch.setattr("fedsmoothlora.runs.trackers._require", lambda key: None)
    follow(TrackingSettings(tensorboard=True), tmp_path, record(0, 0.5))
    assert ["at the end of the run" in message for message in caplog.messages] == [True]


# TensorBoard


@pytest.fixture
def tensorboard() -> Iterator[None]:
    need("tensorboard")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(tensorboard|torch\.utils\.tensorboard|google)\b")
        yield


def scalars(folder: Path) -> dict[int, dict[str, float]]:
    """Metrics by round, as TensorBoard itself reads them."""
    found: dict[int, dict[str, float]] = {}
    events = accumulator(folder)
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            assert tag not in found.setdefault(event.step, {}), f"{tag} twice in round {event.step}"
            found[event.step][tag] = event.value
    return found


def accumulator(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


@pytest.mark.usefixtures("tensorboard")
def test_tensorboard_reads_every_metric_of_every_round(tmp_path: Path) -> None:
    follow(TrackingSettings(tensorboard=True), tmp_path, record(0, 0.25), record(1, 0.5), record(2, 0.75))
    found = scalars(tmp_path)
    assert sorted(found) == [0, 1, 2]
    for round, accuracy in ((0, 0.25), (1, 0.5), (2, 0.75)):
        assert found[round] == pytest.approx(expected(round, accuracy))


@pytest.mark.usefixtures("tensorboard")
def test_tensorboard_shows_the_configuration(tmp_path: Path) -> None:
    follow(TrackingSettings(tensorboard=True), tmp_path, record(0, 0.25))
    follow(TrackingSettings(tensorboard=True), tmp_path, record(1, 0.25))
    (event,) = accumulator(tmp_path).Tensors("config/text_summary")
    assert CONFIG.encode() in event.tensor_proto.string_val[0]


@pytest.mark.usefixtures("tensorboard")
def test_metrics_of_a_killed_run_can_be_read(tmp_path: Path) -> None:
    follow(TrackingSettings(tensorboard=True), tmp_path, record(0, 0.25), record(1, 0.5), killed=True)
    assert sorted(scalars(tmp_path)) == [0, 1]


@pytest.mark.usefixtures("tensorboard")
def test_a_resumed_run_replaces_the_rounds_that_are_run_again(tmp_path: Path) -> None:
    settings = TrackingSettings(tensorboard=True)
    follow(settings, tmp_path, record(0, 0.25), record(1, 0.5), record(2, 0.125), record(3, 0.125))
    follow(settings, tmp_path, record(2, 0.75), killed=True)
    found = scalars(tmp_path)
    assert sorted(found) == [0, 1, 2]
    assert [found[t]["accuracy"] for t in range(3)] == [0.25, 0.5, 0.75]


@pytest.mark.usefixtures("tensorboard")
def test_a_folder_that_cannot_be_made_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    follow(TrackingSettings(tensorboard=True), tmp_path, record(0, 0.25), record(1, 0.5))
    (note,) = caplog.messages
    assert "TensorBoard failed (round 0)" in note


# Weights & Biases


class Listener:
    """A server that takes connections and remembers how many."""

    def __init__(self) -> None:
        self.connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """Use Weights & Biases with its own home folder and a listener as its server and as all proxies."""
    need("wandb")
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    listener = Listener()
    monkeypatch.setenv("WANDB_BASE_URL", listener.address)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, listener.address)
    hooks = sys.exit, sys.excepthook
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(wandb|google|opentelemetry|requests)\b")
        import wandb

        yield listener
        # Its background process ends, so that the next test's has the next test's environment.
        wandb.teardown()
    sys.exit, sys.excepthook = hooks
    listener.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def wandb_runs(folder: Path) -> list[Path]:
    """The files of finished runs; the background process may still be writing them."""
    paths = list((folder / "wandb").glob("offline-run-*/*.wandb"))
    deadline = time.monotonic() + 20
    while not all(any(message.HasField("exit") for message in stored(path)) for path in paths):
        assert time.monotonic() < deadline, "a run was not written to its end"
        time.sleep(0.01)
    return paths


def stored(path: Path) -> Iterator[Any]:
    """The messages of a .wandb file: a header of 7 bytes, then LevelDB's log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] in (b":W&B", b"")
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if at + 7 + length > len(data):  # still being written
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            message = Record()
            message.ParseFromString(parts)
            parts = b""
            yield message


def history(path: Path) -> dict[int, dict[str, float]]:
    """Metrics by round, without those that Weights & Biases adds."""
    found = {}
    for message in stored(path):
        if message.HasField("history"):
            row = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in message.history.item
            }
            found[int(row["_step"])] = {name: v for name, v in row.items() if not name.startswith("_")}
    return found


def test_an_offline_run_has_every_metric_and_prints_nothing(
    network: Listener, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = dict(os.environ)
    settings = TrackingSettings(wandb=True, wandb_project="hospitals")
    follow(settings, folder, record(0, 0.25), record(1, 0.5), record(2, 0.75))
    (path,) = wandb_runs(folder)
    assert history(path) == {t: expected(t, a) for t, a in ((0, 0.25), (1, 0.5), (2, 0.75))}
    (run,) = (message.run for message in stored(path) if message.HasField("run"))
    assert (run.project, run.display_name) == ("hospitals", "toy")
    assert {i.key: json.loads(i.value_json) for i in run.config.update if i.key != "_wandb"} == {
        "name": "toy",
        "training": {"rounds": 3, "lr": 0.02},
    }
    assert capfd.readouterr() == ("", "")
    assert network.connections == 0
    assert {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"} == environment
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


@pytest.mark.slow
def test_an_offline_run_touches_no_network_until_its_process_has_ended(
    network: Listener, folder: Path
) -> None:
    # A process of its own: what Weights & Biases tells about itself, it sends on exit.
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE_RUN, str(folder)], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [history(path) for path in wandb_runs(folder)] == [{0: {"accuracy": 0.5}}]
    assert network.connections == 0


def test_nothing_about_code_or_machine_is_recorded(network: Listener, folder: Path) -> None:
    follow(TrackingSettings(wandb=True), folder, record(0, 0.25))
    (path,) = wandb_runs(folder)
    messages = list(stored(path))
    kinds = {message.WhichOneof("record_type") for message in messages}
    assert not kinds & {"stats", "files", "artifact", "environment", "output", "output_raw"}
    (run,) = (message.run for message in messages if message.HasField("run"))
    assert (run.host, run.HasField("git")) == ("", False)
    assert [file for file in path.parent.glob("files/**/*") if file.is_file()] == []


def test_a_resumed_run_keeps_its_identity(
    network: Listener, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = TrackingSettings(wandb=True)
    follow(settings, folder, record(0, 0.25), record(1, 0.5))
    follow(settings, folder, record(2, 0.75))
    identity = json.loads((folder / "tracking.json").read_text())["wandb_id"]
    paths = wandb_runs(folder)
    for path in paths:
        (run,) = (message.run for message in stored(path) if message.HasField("run"))
        assert run.run_id == identity
    assert sorted(sorted(history(path)) for path in paths) == [[0, 1], [2]]
    assert capfd.readouterr() == ("", "")
    assert network.connections == 0


def test_two_runs_in_one_process_are_tracked_separately(network: Listener, tmp_path: Path) -> None:
    settings = TrackingSettings(wandb=True)
    folders = [tmp_path / "a", tmp_path / "b"]
    both = []
    for one in folders:
        one.mkdir()
        both += trackers(settings, one, CONFIG, one.name)
    for round in range(2):
        for index, tracker in enumerate(both):
            tracker.on_round_end(record(round, 0.5 + index / 4))
    for tracker in both:
        tracker.on_run_end()
    for index, one in enumerate(folders):
        (path,) = wandb_runs(one)
        assert [row["accuracy"] for row in history(path).values()] == [0.5 + index / 4] * 2


@pytest.mark.usefixtures("network")
def test_online_without_a_login_is_an_error_before_training(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrackingError, match=r"wandb login.*tracking\.wandb_mode = 'offline'"):
        trackers(TrackingSettings(wandb=True, wandb_mode="online"), folder, CONFIG, "toy")
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("network")
def test_a_broken_tracking_file_is_an_error_that_names_it(folder: Path) -> None:
    (folder / "tracking.json").write_text("{")
    with pytest.raises(TrackingError, match=r"tracking\.json.*remove the file"):
        trackers(TrackingSettings(wandb=True), folder, CONFIG, "toy")
