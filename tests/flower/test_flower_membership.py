"""Sites join and leave a federation between runs."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedsmoothlora import export
from fedsmoothlora.config import Config, read, to_toml
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.flower.server_app import coordinate
from fedsmoothlora.runs.folders import check_clients, existing_folder
from fedsmoothlora.runs.session import run

SITES = ["hospital-a", "hospital-b", "hospital-c"]


def configuration(clients: list[str], **sections: Any) -> Config:
    table = {
        "name": "sites",
        "model": {"source": "pkg:dinov2-small"},
        "data": {"source": "/data", "classes": ["a", "b"], "test": "/data/test.csv"},
        "partition": {"kind": "by_file"},
        "method": {"name": "fedit"},
        "training": {"rounds": 2, "steps": 1},
        "flower": {"clients": clients},
        **sections,
    }
    return read(table)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """The folder of a run with three sites, as far as a resumption compares it."""
    (tmp_path / "config.toml").write_text(to_toml(configuration(SITES)), encoding="utf-8")
    (tmp_path / "environment.json").write_text(json.dumps({"experiment": "0" * 32}), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("clients", "change"),
    [
        ([*SITES, "hospital-d"], "with hospital-d"),
        (SITES[:2], "without hospital-c"),
        (["hospital-d", *SITES[1:]], "without hospital-a, with hospital-d"),
        (SITES[::-1], "in another order"),
    ],
)
def test_a_run_is_not_resumed_with_other_sites(begun: Path, clients: list[str], change: str) -> None:
    with pytest.raises(ConfigError, match=rf"{change}.*export .*--as merged.*model\.source = 'MODEL'"):
        existing_folder(configuration(clients), {}, begun)


def test_a_coordinator_refuses_other_sites_before_it_waits_for_any(begun: Path) -> None:
    with pytest.raises(ConfigError, match="with hospital-d"):
        coordinate(None, configuration([*SITES, "hospital-d"]), out=None, resume=str(begun))  # type: ignore[arg-type]


def test_the_same_sites_may_have_other_keys_and_wait_longer(begun: Path) -> None:
    keys = {site: f"SHA256:{letter * 43}" for site, letter in zip(SITES, "abc", strict=True)}
    patient = configuration(SITES, flower={"clients": SITES, "nodes": keys, "timeout": 9.0, "warm": False})
    assert existing_folder(patient, {}, begun).path == begun


def test_clients_that_the_partition_gives_need_no_list(begun: Path) -> None:
    """So a run that began in one process can go on with Flower's processes on this machine."""
    check_clients(configuration([]), begun)


def test_a_new_run_begins_where_the_exported_one_ended(toy_table: dict[str, Any], tmp_path: Path) -> None:
    """The way to add a site: the new run's round 0 is the model of the old one's last round."""
    table = {**toy_table, "method": {"name": "fedit"}, "partition": {"kind": "iid", "clients": 2}}
    table["training"] = {**table["training"], "rounds": 1}
    first = run(table, out=tmp_path / "first", console=Console(file=io.StringIO()), outputs=False)
    export(first.folder, as_="merged", out=tmp_path / "model")

    table["model"] = {**table["model"], "source": str(tmp_path / "model")}
    table["partition"] = {"kind": "iid", "clients": 3}
    second = run(table, out=tmp_path / "second", console=Console(file=io.StringIO()), outputs=False)

    def at(metrics: Any, round: int, name: str) -> float:
        return next(
            m["value"] for m in metrics if (m["round"], m["client"], m["name"]) == (round, None, name)
        )

    for name in ("accuracy", "loss"):
        assert at(second.metrics, 0, name) == pytest.approx(at(first.metrics, 1, name), rel=1e-5)
