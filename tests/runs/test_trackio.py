"""Runs that are recorded with trackio: by its interface, and by trackio itself where it is installed."""

import contextvars
import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_tracking import CONFIG, expected, follow, record

from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.config.settings import TrackingSettings
from fedsmoothlora.errors import TrackingError
from fedsmoothlora.runs.trackers import trackers

SETTINGS = TrackingSettings(trackio=True, trackio_project="textures")
RUN = """
import math, sys
from pathlib import Path
import trackio
from fedsmoothlora.config.settings import TrackingSettings
from fedsmoothlora.federation.records import Metric, RoundRecord
from fedsmoothlora.runs.trackers import trackers

before = trackio.init(project="own", name="own", embed=False, auto_log_gpu=False, auto_log_cpu=False)
print("begin")
settings = TrackingSettings(trackio=True, trackio_project="textures")
for rounds in (range(2), range(1, 3)):
    (tracker,) = trackers(settings, Path(sys.argv[1]), "name = 'toy'", "toy")
    for k in rounds:
        tracker.on_round_end(
            RoundRecord(round=k, metrics=[Metric(None, "accuracy", k / 4), Metric("é/7", "loss", math.nan)])
        )
    tracker.on_run_end()
print("end")
assert trackio.context_vars.current_run.get() is before, "the caller's own run goes on"
before.finish()
"""


def interface(made: list[dict[str, Any]]) -> ModuleType:
    """The part of trackio 0.43 that runs use."""
    module = ModuleType("trackio")

    class Run:
        def __init__(self, told: dict[str, Any]) -> None:
            self.told = told

        def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
            self.told["logged"].append((step, metrics))

        def finish(self) -> None:
            self.told["finished"] = True
            print("* Run finished. Uploading logs to Trackio (please wait...)")

    def init(
        project: str,
        name: str | None = None,
        space_id: str | None = None,
        config: dict[str, Any] | None = None,
        resume: str = "never",
        embed: bool = True,
        auto_log_gpu: bool | None = None,
        auto_log_cpu: bool | None = None,
    ) -> Run:
        if space_id == "nobody/none":
            raise ValueError("You must be logged in to Hugging Face locally\nwhen `space_id` is provided.")
        print(f"* Trackio project initialized: {project}")
        made.append({**locals(), "logged": [], "caller": OWN.get(None)})
        return Run(made[-1])

    module.init = init  # type: ignore[attr-defined]
    return module


OWN: contextvars.ContextVar[str] = contextvars.ContextVar("own")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What trackio was told, by run."""
    made: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "trackio", interface(made))
    return made


def test_trackio_gets_every_metric_and_a_resumed_run_goes_on(
    made: list[dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    OWN.set("a run of the caller's")
    follow(SETTINGS, tmp_path, record(0, 0.25), record(1, 0.5))
    follow(SETTINGS, tmp_path, record(1, 0.625))
    first, second = made
    assert (
        first["name"] == second["name"] == json.loads((tmp_path / "tracking.json").read_text())["trackio_run"]
    )
    assert first["name"].startswith("toy-")
    assert (first["project"], first["resume"], first["space_id"]) == ("textures", "allow", None)
    assert first["config"] == {"name": "toy", "training": {"rounds": 3, "lr": 0.02}}
    assert (first["embed"], first["auto_log_gpu"], first["auto_log_cpu"]) == (False, False, False)
    assert [step for step, _ in first["logged"]] == [0, 1]
    assert first["logged"][1][1] == pytest.approx(expected(1, 0.5))
    assert second["logged"] == [(1, pytest.approx(expected(1, 0.625)))]
    assert all(run["finished"] and run["caller"] is None for run in made)
    assert capfd.readouterr() == ("", "")


def test_runs_have_names_of_their_own(made: list[dict[str, Any]], tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        follow(SETTINGS, tmp_path / name, record(0, 0.25))
    assert made[0]["name"] != made[1]["name"]


def test_a_space_that_cannot_be_used_is_refused(made: list[dict[str, Any]], tmp_path: Path) -> None:
    settings = TrackingSettings(trackio=True, trackio_space="nobody/none")
    with pytest.raises(
        TrackingError, match=r"trackio_space = 'nobody/none': You must be logged in.*locally when"
    ):
        trackers(settings, tmp_path, CONFIG, "toy")
    assert list(tmp_path.iterdir()) == []


def test_a_space_without_trackio_is_refused(toy_table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no effect unless tracking\.trackio = true"):
        read(toy_table, {"tracking.trackio_space": "me/runs"})


def test_a_missing_package_names_the_extra_of_trackio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(TrackingError, match=r"pip install 'fedsmoothlora\[trackio\]'"):
        trackers(SETTINGS, tmp_path, CONFIG, "toy")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio does not fit the pinned Pillow")
def test_trackio_itself_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, because trackio reads ``TRACKIO_DIR`` when it is imported."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (tmp_path / "run").mkdir()
    read_back = """
import json
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("textures")
print(json.dumps([name, SQLiteStorage.get_logs("textures", name)]))
"""
    shown, kept = (
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=True
        ).stdout
        for code in (RUN, read_back)
    )
    assert shown.partition("begin\n")[2].startswith("end\n")
    name, logs = json.loads(kept)
    assert name == json.loads((tmp_path / "run" / "tracking.json").read_text())["trackio_run"]
    assert [(one["step"], one["accuracy"]) for one in logs] == [(0, 0.0), (1, 0.25), (1, 0.25), (2, 0.5)]
    assert all(math.isnan(one["client/é/7/loss"]) for one in logs)
