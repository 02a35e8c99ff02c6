"""A federation of real processes on loopback whose sites lie, and whose processes are killed."""

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from machines import Machines, assert_same_weights, metrics, wait_until, weights

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import read
from fedsmoothlora.exports.export import write_export
from fedsmoothlora.exports.run_model import RunModel
from fedsmoothlora.exports.trained import global_model
from fedsmoothlora.federation.engines.in_process import InProcess
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import ClientReply, Simulation
from fedsmoothlora.runs.planning import build, plan

pytest.importorskip("flwr")
pytestmark = pytest.mark.slow

HONEST = ("hospital-a", "hospital-b")
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

# A hostile site needs neither torch nor this package: it changes what an honest one has sent.
HOSTILE_SITE = """
import json, pickle, time, zlib
from pathlib import Path
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from safetensors.numpy import load, save

RECORDS, CLIENT, WHAT = Path({records!r}), {client!r}, {what!r}


def heard(kind):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        for file in sorted(RECORDS.glob("done-hospital-a-*.json")):
            entry = json.loads(file.read_text())
            if entry["kind"] == kind:
                return entry["up"]
        time.sleep(0.1)
    raise TimeoutError(kind)


def with_table(change, data):
    end = 8 + int.from_bytes(data[:8], "little")
    table = change(data[8:end])
    return len(table).to_bytes(8, "little") + table + data[end:]


def answer(message, context, honest):
    content = RecordDict({{"status": ConfigRecord({{"status": "done"}})}})
    up = heard(message.metadata.message_type)
    if message.metadata.message_type == "query.agree":
        content["site_info"] = ConfigRecord({{**up["tables"]["site_info"], "client": CLIENT}})
        return Message(content, reply_to=message)
    asked = message.content["fields"]
    tensors = load(with_table(zlib.decompress, Path(up["arrays"]["tensors/file"][2]).read_bytes()))
    asked_for = {{key: asked[key] for key in ("experiment", "round", "attempt")}}
    fields = {{**up["tables"]["fields"], **asked_for, "client": CLIENT}}
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

    def train(self, simulation: Simulation, clients: Sequence[str], *given: Any) -> Iterator[ClientReply]:
        left = [c for c in clients if simulation.server.round != 1 or c != "hospital-b"]
        return super().train(simulation, left, *given)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Machines]:
    """A coordinator, two honest sites and two hostile ones."""
    made = Machines(tmp_path_factory.mktemp("machines"), tiny_folder, HONEST)
    made.table["training"]["rounds"] = 4
    # The dead are not waited for so long: Flower sees a death within about a minute.
    table = {**made.table, "flower": {"clients": [*HONEST, *HOSTILE], "wait": 120.0, "timeout": 240.0}}
    try:
        (made.folder("coordinator") / "my.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
        made.run(made.documented("coordinator"), "coordinator")
        made.record()
        made.start_coordinator()
        for client, what in HOSTILE.items():
            text = HOSTILE_SITE.format(records=str(made.records), client=client, what=what)
            (made.records / f"{client}.py").write_text(text)
        for site in (*HONEST, *HOSTILE):
            made.admit(site)
            made.start_site(site)
        yield made
    finally:
        made.end_all()


@pytest.fixture(scope="module")
def troubled_run(machines: Machines) -> Path:
    """Four rounds: one site is killed in round 2, the coordinator in round 3."""
    marks = {site: machines.root / f"{site}-trains" for site in HONEST}
    go = machines.root / "go"
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
    planned = plan(read(machines.table))
    simulation = build(planned)
    simulation.engine = WithoutOne()
    list(run_rounds(simulation, Callback()))
    outcome = RunModel(
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
    assert [found[round, None, "clients"] for round in (1, 2, 3, 4)] == [2, 1, 2, 2]
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
