"""A federation of real processes on loopback, brought up by the commands of docs/deploy.md.

One coordinator serves all tests of this file, in their order: processes are what takes the time.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from machines import SITES, Machines
from rich.console import Console
from safetensors.torch import load, load_file
from torch import Tensor

from fedsmoothlora import run

pytest.importorskip("flwr")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("flower")]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Machines]:
    """A coordinator and three sites that are there, as the documentation says."""
    made = Machines(tmp_path_factory.mktemp("machines"), tiny_folder)
    table = {**made.table, "flower": {"clients": list(SITES), "wait": 60.0, "timeout": 60.0}}
    try:
        for machine in ("coordinator", *SITES):
            (made.folder(machine) / "my.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
        made.run(made.documented("coordinator"), "coordinator")
        made.record()
        made.start_coordinator()
        for site in SITES:
            shutil.copy(made.root / "coordinator/certificates/ca.crt", made.folder(site))
            checked = made.run(made.documented("site hospital-a", site), site)
            assert "base weights (SHA-256)" in checked
            admit(made, site)
            made.start_site(site, "histogram=true" if site == "hospital-c" else "")
        yield made
    finally:
        made.end_all()


def admit(machines: Machines, site: str) -> None:
    shutil.copy(machines.folder(site) / "site.key.pub", machines.root / f"coordinator/{site}.key.pub")
    machines.run(machines.documented("coordinator, for every site", site), "coordinator")


def metrics(folder: Path) -> dict[tuple[int, str | None, str], float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {(line["round"], line["client"], line["name"]): line["value"] for line in lines}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        difference = float((value - other[name]).norm())
        assert difference <= 1e-5 * float(value.norm()), f"{name}: {difference} of {float(value.norm())}"


@pytest.fixture(scope="module")
def documented_run(machines: Machines) -> Path:
    machines.flwr_run("runs/documented")
    return machines.root / "coordinator" / "runs" / "documented"


@pytest.fixture(scope="module")
def in_process(machines: Machines) -> Path:
    return run(machines.table, out=machines.root / "in-process", console=Console(quiet=True)).folder


def test_the_documented_commands_train_what_one_process_trains(
    documented_run: Path, in_process: Path
) -> None:
    assert_same_weights(weights(documented_run), weights(in_process))


def test_metrics_and_report_are_those_of_one_process(documented_run: Path, in_process: Path) -> None:
    found, right = metrics(documented_run), metrics(in_process)
    timeless = [key for key in right if not key[2].startswith("seconds")]
    assert {key for key in found if not key[2].startswith("seconds")} == set(timeless)
    for key in timeless:
        assert found[key] == pytest.approx(right[key], rel=1e-4), key
    for key in timeless:
        if key[2] in ("bytes_up", "bytes_down", "samples", "clients"):
            assert found[key] == right[key], key
    assert {path.name for path in in_process.iterdir()} - {"clients"} <= {
        path.name for path in documented_run.iterdir()
    }


def recorded(machines: Machines, kind: str) -> list[dict[str, Any]]:
    entries = [json.loads(path.read_text()) for path in sorted(machines.records.glob("done-*.json"))]
    return [entry for entry in entries if entry["kind"] == kind]


def tensors_of(written: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The tensors in what was sent, and the bytes that they take."""
    (stype, _, file), *others = written["arrays"].values()
    assert stype == "safetensors"
    assert not others
    data = Path(file).read_bytes()
    return load(data), len(data) - 8 - int.from_bytes(data[:8], "little")


def test_bytes_on_the_wire_are_those_that_were_counted(machines: Machines, documented_run: Path) -> None:
    found = metrics(documented_run)
    for round in (1, 2):
        entries = [
            entry
            for entry in recorded(machines, "train")
            if entry["down"]["tables"]["fields"]["round"] == round - 1
        ]
        assert sorted(entry["client"] for entry in entries) == sorted(SITES)
        assert sum(tensors_of(entry["down"])[1] for entry in entries) == found[round, None, "bytes_down"]
        for entry in entries:
            assert tensors_of(entry["up"])[1] == found[round, entry["client"], "bytes_up"]


def test_nothing_leaves_a_site_but_what_the_table_of_privacy_names(
    machines: Machines, documented_run: Path, in_process: Path
) -> None:
    layers = {f"dinov2.encoder.layer.{block}.attention.{name}_proj" for block in (0, 1) for name in "qkv"}
    factors = {f"sent:{layer}/{factor}" for layer in layers for factor in "BA"}
    head = {"head:classifier.weight", "head:classifier.bias"}
    figures = {f"figures:{name}" for _, client, name in metrics(in_process) if client is not None}
    entries = recorded(machines, "query.agree") + recorded(machines, "train")
    assert {entry["kind"] for entry in recorded_all(machines)} == {"query.agree", "train"}
    for entry in entries:
        up = entry["up"]
        assert up["metrics"] == []
        assert up["tables"].pop("status") == {"status": "done"}
        if entry["kind"] == "train":
            fields = up["tables"].pop("fields")
            assert fields.keys() - figures - {"figures:seconds_loading"} == {
                *("client", "experiment", "round", "attempt", "samples")
            }
            assert tensors_of(up)[0].keys() == factors | head
            assert all(type(value) in (str, int, float) for value in fields.values())
        else:
            facts = up["tables"].pop("facts")
            shown = [10, 10, 10, 10] if entry["client"] == "hospital-a" else [8, 8, 8, 8]
            assert facts.pop("histogram") == (shown if entry["client"] == "hospital-c" else [])
            assert facts.keys() == {"client", "samples", "validation", "classes", "weights", "tokenizer"}
            assert facts["samples"] == SITES[entry["client"]]
            assert up["arrays"] == {}
        assert up["tables"] == {}
        everything = json.dumps(entry["up"]["tables"])
        assert str(machines.data) not in everything
    partition = json.loads((documented_run / "partition.json").read_text())
    assert partition["clients"] == {"hospital-c": [8, 8, 8, 8]}


def recorded_all(machines: Machines) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in machines.records.glob("done-*.json")]


def test_only_safetensors_and_plain_values_cross_the_wire(machines: Machines, documented_run: Path) -> None:
    for entry in recorded_all(machines):
        for written in (entry["down"], entry["up"]):
            assert written["metrics"] == []
            for stype, dtype, _ in written["arrays"].values():
                assert (stype, dtype) == ("safetensors", "uint8")
            for table in written["tables"].values():
                for value in table.values():
                    assert isinstance(value, str | int | float | list)
