"""Runs that are recorded with MLflow, read back with MLflow's own client."""

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tracking import CONFIG, expected, follow, need, record

from fedsmoothlora.config import ConfigError, read
from fedsmoothlora.config.settings import TrackingSettings
from fedsmoothlora.errors import TrackingError
from fedsmoothlora.federation.records import Metric, RoundRecord
from fedsmoothlora.runs.trackers import _MLFLOW_ENVIRONMENT, _environment, _mlflow_key, trackers

SETTINGS = TrackingSettings(mlflow=True)
HOSTILE = "../../<script>\n" + "é" * 300


@given(st.lists(st.text(max_size=8) | st.sampled_from(["_x2e_", ".", "..", "a/", "/a", "a//b"]), unique=True))
def test_tags_become_different_names_that_mlflow_takes(tags: list[str]) -> None:
    keys = [_mlflow_key(tag) for tag in tags]
    assert len(set(keys)) == len(tags)
    for key in keys:
        assert re.fullmatch(r"[\w.\- :]+(/[\w.\- :]+)*", key, re.ASCII)
        assert not any(set(part) == {"."} for part in key.split("/"))


def test_usual_names_stay_and_long_ones_are_cut() -> None:
    for tag in ("accuracy", "client/7/train_loss", "client/hospital-a/own_micro_f1"):
        assert _mlflow_key(tag) == tag
    one, other = (_mlflow_key("x" * 300 + end) for end in "ab")
    assert len(one) == len(other) == 250
    assert one != other


def test_an_address_without_mlflow_is_refused(toy_table: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no effect unless tracking\.mlflow = true"):
        read(toy_table, {"tracking.mlflow_uri": "http://mlflow.example.org"})
    assert read(toy_table, {"tracking.mlflow": True}).tracking.mlflow_experiment == "fedsmoothlora"


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(TrackingError, match=r"pip install 'fedsmoothlora\[mlflow\]'"):
        trackers(SETTINGS, tmp_path, CONFIG, "toy")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    """MLflow's client of the run's own database."""
    need("mlflow")
    with _environment(_MLFLOW_ENVIRONMENT):
        import mlflow

        yield mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")


def kept(client: Any, folder: Path) -> Any:
    return client.get_run(json.loads((folder / "tracking.json").read_text())["mlflow_run_id"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::Warning:(sqlalchemy|alembic|mlflow|pydantic)")
def test_mlflow_has_every_metric_and_a_resumed_run_goes_on(
    client: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    odd = RoundRecord(round=1, metrics=[Metric(HOSTILE, "train_loss", math.nan), *record(1, 0.5).metrics])
    follow(SETTINGS, tmp_path, record(0, 0.25), odd, record(2, 0.125))
    first = kept(client, tmp_path)
    assert first.info.run_name == "toy"
    assert first.info.status == "KILLED", "it ended before its last round"
    assert first.data.params == {"name": "toy", "training.rounds": "3", "training.lr": "0.02"}
    odd_key = _mlflow_key(f"client/{HOSTILE}/train_loss")
    assert math.isnan(first.data.metrics.pop(odd_key))
    assert first.data.metrics == pytest.approx(expected(2, 0.125))
    follow(SETTINGS, tmp_path, record(2, 0.625), record(3, 0.75))
    second = kept(client, tmp_path)
    assert (second.info.run_id, second.info.status) == (first.info.run_id, "FINISHED")
    history = [(one.step, one.value) for one in client.get_metric_history(second.info.run_id, "accuracy")]
    assert sorted(history) == [(0, 0.25), (1, 0.5), (2, 0.125), (2, 0.625), (3, 0.75)]
    assert history.index((2, 0.625)) > history.index((2, 0.125))
    assert second.data.metrics["accuracy"] == 0.75
    assert {path.name for path in tmp_path.iterdir()} == {"mlruns", "tracking.json"}
    assert capfd.readouterr() == ("", "")
    from mlflow.telemetry.client import get_telemetry_client

    assert get_telemetry_client() is None
    with pytest.raises(TrackingError, match=r"tracking\.mlflow_uri = 'nonsense://x'") as error:
        trackers(TrackingSettings(mlflow=True, mlflow_uri="nonsense://x"), tmp_path, CONFIG, "toy")
    assert "\n" not in str(error.value)
