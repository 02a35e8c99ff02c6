"""A federation of real processes on loopback, brought up by the commands of docs/deploy.md.

One coordinator serves all tests of this file, in their order: processes are what takes the time.
"""

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from machines import SITES, Machines, assert_same_weights, free_port, metrics, wait_until, weights
from rich.console import Console
from safetensors.torch import load
from torch import Tensor

from fedsmoothlora import run
from fedsmoothlora.flower.keys import write_node_key

pytest.importorskip("flwr")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Machines]:
    """A coordinator and three sites that are there, as the documentation says."""
    made = Machines(tmp_path_factory.mktemp("machines"), tiny_folder)
    table = {**made.table, "flower": {"clients": list(SITES), "wait": 60.0, "timeout": 60.0}}
    try:
        made.prepare(table)
        made.record()
        made.start_coordinator()
        for site in SITES:
            if site == "hospital-a":
                assert "base weights (SHA-256)" in made.run(made.documented("site hospital-a", site), site)
            made.admit(site)
            made.start_site(site, "histogram=true" if site == "hospital-c" else "")
        yield made
    finally:
        made.end_all()


# Kills the site's warm process before the second round.
KILLING_SITE = """
import psutil


def answer(message, context, honest):
    if message.metadata.message_type == "train" and message.content["fields"]["round"] == 1:
        words = [{root!r}, "fedsmoothlora.flower.warm_process", '"client-id": "hospital-b"']
        found = [
            one for one in psutil.process_iter(["cmdline"])
            if all(word in " ".join(one.info["cmdline"] or []) for word in words)
        ]
        for one in found:
            one.kill()
            open({root!r} + "/killed", "a").write(str(one.pid) + "\\n")
        psutil.wait_procs(found)
    return honest(message, context)
"""


@pytest.fixture(scope="module")
def documented_run(machines: Machines) -> Path:
    killing = KILLING_SITE.format(root=str(machines.root))
    (machines.records / "hospital-b.py").write_text(killing, encoding="utf-8")
    commands = machines.documented("coordinator, a run").replace("runs/xrays", "runs/documented")
    assert "report.html" in machines.run(commands, "coordinator", 480)
    return machines.root / "coordinator" / "runs" / "documented"


@pytest.fixture(scope="module")
def in_process(machines: Machines) -> Path:
    return run(
        machines.in_process_table(), out=machines.root / "in-process", console=Console(quiet=True)
    ).folder


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


def test_warm_processes_answer_until_the_run_ends_and_a_killed_one_is_started_again(
    machines: Machines, documented_run: Path
) -> None:
    assert len((machines.root / "killed").read_text().splitlines()) == 1
    for site in SITES:
        assert "without a warm process" not in machines.log(site)
        assert not (machines.folder(site) / "state" / "warm").exists()
    assert machines.running("fedsmoothlora.flower.warm_process") == []


def tensors_of(written: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The tensors in what was sent, and the bytes that they take."""
    (stype, _, file), *others = written["arrays"].values()
    assert stype == "safetensors"
    assert not others
    data = Path(file).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    table = zlib.decompress(data[8:end])
    return load(len(table).to_bytes(8, "little") + table + data[end:]), len(data) - end


def test_bytes_on_the_wire_are_those_that_were_counted(machines: Machines, documented_run: Path) -> None:
    found = metrics(documented_run)
    for round in (1, 2):
        entries = [
            entry
            for entry in machines.recorded("train")
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
    measured = {f"metrics:{name}" for _, client, name in metrics(in_process) if client is not None}
    entries = machines.recorded("query.agree") + machines.recorded("train")
    assert {entry["kind"] for entry in machines.recorded()} == {"query.agree", "train", "query.end"}
    for entry in machines.recorded("query.end"):
        assert entry["up"] == {"tables": {"status": {"status": "done"}}, "arrays": {}, "metrics": []}
    for entry in entries:
        up = entry["up"]
        assert up["metrics"] == []
        assert up["tables"].pop("status") == {"status": "done"}
        if entry["kind"] == "train":
            fields = up["tables"].pop("fields")
            assert fields.keys() - measured - {"metrics:seconds_loading"} == {
                *("client", "experiment", "round", "attempt", "exchange", "samples")
            }
            assert tensors_of(up)[0].keys() == factors | head
            assert all(type(value) in (str, int, float) for value in fields.values())
        else:
            facts = up["tables"].pop("site_info")
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


def test_only_safetensors_and_plain_values_cross_the_wire(machines: Machines, documented_run: Path) -> None:
    for entry in machines.recorded():
        for written in (entry["down"], entry["up"]):
            assert written["metrics"] == []
            for stype, dtype, _ in written["arrays"].values():
                assert (stype, dtype) == ("safetensors", "uint8")
            for table in written["tables"].values():
                for value in table.values():
                    assert isinstance(value, str | int | float | list)


# Added to a site's key and node that Flower must not let in.
INTRUDERS = {
    "unregistered": "--auth-supernode-private-key site.key --root-certificates ca.crt",
    "plain-text": "--insecure",
}


def test_a_node_without_a_registered_key_or_without_tls_cannot_join(
    machines: Machines, documented_run: Path
) -> None:
    before = nodes_online(machines)
    for name, how in INTRUDERS.items():
        shutil.copy(machines.root / "coordinator/certificates/ca.crt", machines.folder(name))
        write_node_key(machines.folder(name) / "site.key")
        address = f"127.0.0.1:{machines.port}"
        machines.start(
            f"\nflower-supernode --port {free_port()} --superlink {address} {how} --max-retries 1 "
            "--node-config 'client-id=\"hospital-a\"'",
            name,
        )
    for name in INTRUDERS:
        wait_until(f"{name} gives up: {machines.log(name)}", lambda n=name: machines.ended(n), 60)
        assert "could not establish a connection to the SuperLink" in machines.log(name)
    assert nodes_online(machines) == before
    assert len(before) == len(SITES)


def nodes_online(machines: Machines) -> list[str]:
    commands = "set -a; . federation/flower.env; set +a\nflwr supernode list --format json"
    listed = json.loads(machines.run(commands, "coordinator"))
    return sorted(node["node-id"] for node in listed["nodes"] if node["status"] == "online")


def test_a_run_that_is_refused_before_round_0_fails_with_both_sides_values(
    machines: Machines, documented_run: Path
) -> None:
    federation = machines.root / "coordinator" / "federation"
    (machines.records / "hospital-c.py").write_text(
        "from pathlib import Path\nfrom fedsmoothlora.flower.client_app import client_app\n"
        "from fedsmoothlora.config import read, to_toml\n"
        "def answer(message, context, honest):\n"
        f"    config = read({str(federation / 'config.toml')!r}, "
        "{'data.classes': ['plain', 'rows', 'columns', 'checks']})\n"
        f"    own = Path({str(machines.folder('hospital-c') / 'own.toml')!r})\n"
        "    own.write_text(to_toml(config))\n"
        "    return client_app(own)(message, context)\n"
    )
    said = machines.run(machines.a_run("runs/refused"), "coordinator", 300, fails=True)
    assert not (machines.root / "coordinator/runs/refused").exists()
    assert "the label map of hospital-c is [plain, rows, columns, checks]" in said
    assert "the coordinator's is [rows, columns, checks, plain]" in said
