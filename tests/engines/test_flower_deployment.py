"""A federation of real processes on loopback, brought up by the commands of docs/deploy.md.

One coordinator serves all tests of this file, in their order: processes are what takes the time.
"""

import json
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from machines import SITES, Machines, free_port, wait_until
from rich.console import Console
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from fedsmoothlora import run
from fedsmoothlora.config import read, to_toml
from fedsmoothlora.engines.flower.keys import write_node_key
from fedsmoothlora.engines.in_process import InProcess
from fedsmoothlora.exchange import Message, Reply
from fedsmoothlora.exports import write_export
from fedsmoothlora.exports.outcome import Outcome
from fedsmoothlora.exports.trained import global_model
from fedsmoothlora.planning import build, plan
from fedsmoothlora.rounds import Simulation, run_rounds
from fedsmoothlora.watching import Watcher

pytest.importorskip("flwr")
pytestmark = pytest.mark.slow


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
            if site == "hospital-a":
                assert "base weights (SHA-256)" in made.run(made.documented("site hospital-a", site), site)
            else:
                write_node_key(made.folder(site) / "site.key")
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
    commands = machines.documented("coordinator, a run").replace("runs/xrays", "runs/documented")
    assert "report.html" in machines.run(commands, "coordinator", 240)
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
    end = 8 + int.from_bytes(data[:8], "little")
    table = zlib.decompress(data[8:end])
    return load(len(table).to_bytes(8, "little") + table + data[end:]), len(data) - end


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


HOSTILE = {
    # By round: what is sent, and what the coordinator says of it.
    "mallory": {
        0: ("a pickle", "no safetensors file"),
        1: ("not a number", "values are not finite"),
        2: ("a giant", "the norm of its upload"),
        3: ("another shape", "expected a low-rank product"),
    },
    "trudy": {
        0: ("another's name", "it names client 'hospital-a'"),
        1: ("an old round", "its reply is for round"),
        2: ("no samples", "its number of training samples is 0"),
        3: ("a layer too many", "unknown layer"),
    },
}

# A hostile site needs neither torch nor this package: it sends what it wants.
HOSTILE_SITE = """
import json, pickle, zlib
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from safetensors.numpy import load, save

FACTS, FIELDS, FILE, CLIENT = {facts!r}, {fields!r}, {file!r}, {client!r}
WHAT = {what!r}


def with_table(change, data):
    end = 8 + int.from_bytes(data[:8], "little")
    table = change(data[8:end])
    return len(table).to_bytes(8, "little") + table + data[end:]


def answer(message, context, honest):
    content = RecordDict({{"status": ConfigRecord({{"status": "done"}})}})
    if message.metadata.message_type == "query.agree":
        content["facts"] = ConfigRecord({{**FACTS, "client": CLIENT}})
        return Message(content, reply_to=message)
    asked = message.content["fields"]
    tensors = load(with_table(zlib.decompress, Path(FILE).read_bytes()))
    asked_for = {{key: asked[key] for key in ("experiment", "round", "attempt")}}
    fields = {{**FIELDS, **asked_for, "client": CLIENT}}
    what = WHAT[asked["round"]][0]
    layer = next(key for key in tensors if key.endswith("/B"))
    if what == "not a number":
        tensors[layer] = tensors[layer] * np.float32("nan")
    if what == "a giant":
        tensors[layer] = tensors[layer] * np.float32(1e6)
    if what == "another shape":
        tensors[layer] = np.concatenate([tensors[layer]] * 2)
    if what == "a layer too many":
        tensors["sent:images/B"], tensors["sent:images/A"] = tensors[layer], tensors[layer].T.copy()
    if what == "another's name":
        fields["client"] = "hospital-a"
    if what == "an old round":
        fields["round"] -= 1
    if what == "no samples":
        fields["samples"] = 0
    data = pickle.dumps(tensors) if what == "a pickle" else with_table(zlib.compress, save(tensors))
    content["fields"] = ConfigRecord(fields)
    content["tensors"] = ArrayRecord({{"file": Array("uint8", (len(data),), "safetensors", data)}})
    return Message(content, reply_to=message)
"""

# A site that shows that it trains in a round, and waits until it may.
SLOW_SITE = """
import time
from pathlib import Path

MARK, GO = Path({mark!r}), Path({go!r})


def answer(message, context, honest):
    if message.metadata.message_type == "train" and message.content["fields"]["round"] == {round}:
        MARK.touch()
        while not GO.exists():
            time.sleep(0.1)
    return honest(message, context)
"""


class WithoutOne(InProcess):
    """Client hospital-b gives no reply in the second round."""

    def train(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        watcher: Watcher,
    ) -> Iterator[tuple[str, Reply]]:
        left = [c for c in clients if simulation.server.round != 1 or c != "hospital-b"]
        return super().train(simulation, left, message, watcher)


@pytest.fixture(scope="module")
def troubled_run(machines: Machines, documented_run: Path) -> Path:
    """Four rounds: two sites are hostile, one is killed in round 2, the coordinator in round 3."""
    # Slow machines get more time.
    slowest = max(value for key, value in metrics(documented_run).items() if key[2] == "seconds_round")
    clients = [*SITES, *HOSTILE]
    app = machines.root / "coordinator/federation/config.toml"
    config = read(app, {"flower.clients": clients, "training.rounds": 4, "flower.timeout": 3 * slowest})
    app.write_text(to_toml(config), encoding="utf-8")
    facts, trained = (
        next(e for e in recorded(machines, kind) if e["client"] == "hospital-a")["up"]
        for kind in ("query.agree", "train")
    )
    for client, what in HOSTILE.items():
        text = HOSTILE_SITE.format(
            facts=facts["tables"]["facts"],
            fields=trained["tables"]["fields"],
            file=trained["arrays"]["tensors/file"][2],
            client=client,
            what=what,
        )
        (machines.records / f"{client}.py").write_text(text)
        write_node_key(machines.folder(client) / "site.key")
        shutil.copy(machines.root / "coordinator/certificates/ca.crt", machines.folder(client))
        admit(machines, client)
        machines.start_site(client)
    marks, go = (
        {site: machines.root / f"{site}-trains" for site in ("hospital-a", "hospital-b")},
        machines.root / "go",
    )
    for round, site in ((1, "hospital-b"), (2, "hospital-a")):
        text = SLOW_SITE.format(mark=str(marks[site]), go=str(go), round=round)
        (machines.records / f"{site}.py").write_text(text)

    folder = machines.root / "coordinator" / "runs" / "troubled"
    machines.start(machines.a_run("runs/troubled"), "run", "coordinator")
    wait_until("hospital-b trains in round 2", marks["hospital-b"].exists, 180)
    machines.end("hospital-b", signal.SIGKILL)
    wait_until("hospital-a trains in round 3", marks["hospital-a"].exists, 240)
    machines.end("coordinator", signal.SIGKILL)
    machines.end("run", signal.SIGKILL)
    assert (folder / "checkpoints/0002.json").exists()
    assert not (folder / "checkpoints/0003.json").exists()
    go.touch()
    machines.start_coordinator()
    machines.start_again("hospital-b")
    machines.run(machines.a_run("runs/troubled", key="resume"), "coordinator", 240)
    return folder


def test_a_run_with_hostile_sites_and_killed_processes_ends_as_one_without_them(
    machines: Machines, troubled_run: Path
) -> None:
    planned = plan(read(machines.table, {"training.rounds": 4}))
    simulation = build(planned)
    simulation.engine = WithoutOne()
    list(run_rounds(simulation, Watcher()))
    outcome = Outcome(
        config=planned.config,
        task="image-classification",
        server=simulation.server,
        partition=planned.partition_table(),
        metrics=[],
    )
    model = machines.root / "reference" / "model"
    write_export(outcome, global_model(simulation.server), "merged", model)
    assert_same_weights(weights(troubled_run), weights(machines.root / "reference"))


def test_a_round_ends_without_a_killed_client_which_comes_back_with_its_state(troubled_run: Path) -> None:
    log = (troubled_run / "run.log").read_text(encoding="utf-8")
    assert "round 2: no reply of client hospital-b" in log or "round 2: client hospital-b is left out" in log
    found = metrics(troubled_run)
    assert [found[round, None, "clients"] for round in (1, 2, 3, 4)] == [3, 2, 3, 3]
    assert (3, "hospital-b", "samples") in found
    # It missed S^1, and had not yet been sent S^0: its state and that sum are what the reference has too.
    assert "lost its state" not in log


@pytest.mark.parametrize(("client", "round"), [(c, r) for c, rounds in HOSTILE.items() for r in rounds])
def test_what_a_hostile_site_sends_is_refused_with_the_reason(
    troubled_run: Path, client: str, round: int
) -> None:
    what, reason = HOSTILE[client][round]
    lines = [
        line
        for line in (troubled_run / "run.log").read_text(encoding="utf-8").splitlines()
        if f"round {round + 1}: upload refused: client {client}" in line
    ]
    assert lines, what
    assert all(reason in line for line in lines), lines
    assert (round + 1, client, "samples") not in metrics(troubled_run)


def test_sites_that_disagree_are_refused_before_round_0_with_both_sides_values(
    machines: Machines, troubled_run: Path, tiny_folder: Path
) -> None:
    for client in HOSTILE:
        machines.end(client)
    federation = machines.root / "coordinator" / "federation"
    config = read(federation / "config.toml", {"flower.clients": list(SITES)})
    (federation / "config.toml").write_text(to_toml(config), encoding="utf-8")
    # hospital-a has another tokenizer, hospital-b other weights, hospital-c another label map.
    models = {site: machines.folder(site) / "model" for site in ("hospital-a", "hospital-b")}
    for site, folder in models.items():
        shutil.copytree(tiny_folder, folder)
        machines.end(site)
        machines.start_site(site, f'model="{folder}"')
    (models["hospital-a"] / "tokenizer.json").write_text("{}")
    file = models["hospital-b"] / "model.safetensors"
    tensors = load_file(file)
    tensors[next(iter(tensors))] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    (machines.records / "hospital-c.py").write_text(
        "from pathlib import Path\nfrom fedsmoothlora.engines.flower.client_app import client_app\n"
        "from fedsmoothlora.config import read, to_toml\n"
        "def answer(message, context, honest):\n"
        f"    config = read({str(federation / 'config.toml')!r}, "
        "{'data.classes': ['plain', 'rows', 'columns', 'checks']})\n"
        f"    own = Path({str(machines.folder('hospital-c') / 'own.toml')!r})\n"
        "    own.write_text(to_toml(config))\n"
        "    return client_app(own)(message, context)\n"
    )
    said = machines.run(machines.a_run("runs/refused"), "coordinator", 180)
    assert not (machines.root / "coordinator/runs/refused").exists()
    assert "the label map of hospital-c is [plain, rows, columns, checks]" in said
    assert "the coordinator's is [rows, columns, checks, plain]" in said
    assert "the tokenizer (SHA-256) of hospital-a is " in said
    assert "the coordinator's is none" in said
    assert "the base weights (SHA-256) of hospital-b is " in said
