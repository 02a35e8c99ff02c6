"""A federation of real processes on loopback whose sites lie, and whose processes are killed."""

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
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
# By round: the lie, and the coordinator's reason. `test_flower_hostile` tells all lies that there are.
LIES = {
    0: ("a pickle", "no safetensors file"),
    1: ("not a number", "values are not finite"),
    2: ("another's name", "it names client 'hospital-a'"),
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
    if what == "another's name":
        fields["client"] = "hospital-a"
    data = pickle.dumps(tensors) if what == "a pickle" else with_table(zlib.compress, save(tensors))
    content["fields"] = ConfigRecord(fields)
    content["tensors"] = ArrayRecord({{"file": Array("uint8", (len(data),), "safetensors", data)}})
    return Message(content, reply_to=message)
"""

# A site that shows that it trains in a round, and waits until it may go on.
SLOW_SITE = """
import time
from pathlib import Path

MARK, GO = Path({mark!r}), Path({go!r})


def answer(message, context, honest):
    if message.metadata.message_type == "train" and message.content["fields"]["round"] == 1:
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
    """A coordinator, two honest sites and a hostile one."""
    made = Machines(tmp_path_factory.mktemp("machines"), tiny_folder, HONEST)
    made.table["training"]["rounds"] = 3
    # Flower notices a death within about a minute, which ends a round before this timeout.
    table = {**made.table, "flower": {"clients": [*HONEST, "mallory"], "wait": 120.0, "timeout": 240.0}}
    try:
        made.prepare(table)
        made.record()
        made.start_coordinator()
        text = HOSTILE_SITE.format(records=str(made.records), client="mallory", what=LIES)
        (made.records / "mallory.py").write_text(text)
        for site in (*HONEST, "mallory"):
            made.admit(site)
            made.start_site(site)
        yield made
    finally:
        made.end_all()


def slow_in_round_2(machines: Machines, attempt: int) -> tuple[dict[str, Path], Path]:
    """Let the honest sites wait in round 2; the files that show that they do, and the one that ends it."""
    marks = {site: machines.root / f"{site}-{attempt}" for site in HONEST}
    go = machines.root / f"go-{attempt}"
    for site, mark in marks.items():
        text = SLOW_SITE.format(mark=str(mark), go=str(go))
        (machines.records / f"{site}.py").write_text(text)
    return marks, go


@pytest.fixture(scope="module")
def troubled_run(machines: Machines) -> Path:
    """Three rounds: the coordinator is killed in round 2, and a site in the same round once it is resumed."""
    folder = machines.root / "coordinator" / "runs" / "troubled"
    marks, go = slow_in_round_2(machines, 1)
    machines.start(machines.a_run("runs/troubled"), "run", "coordinator")
    for site, mark in marks.items():
        wait_until(f"{site} trains in round 2", mark.exists, 180)
    machines.end("coordinator", signal.SIGKILL)
    machines.end("run", signal.SIGKILL)
    assert (folder / "checkpoints/0001.json").exists()
    assert not (folder / "checkpoints/0002.json").exists()
    go.touch()

    marks, go = slow_in_round_2(machines, 2)
    machines.start_coordinator()
    machines.start(machines.a_run("runs/troubled", key="resume"), "resumed", "coordinator")
    for site, mark in marks.items():
        wait_until(f"{site} trains in round 2 again", mark.exists, 180)
    machines.end("hospital-b", signal.SIGKILL)
    (machines.records / "hospital-b.py").unlink()
    machines.start_again("hospital-b")  # Flower lets it in once it has noticed its death
    go.touch()
    wait_until("the run ends", lambda: machines.ended("resumed"), 240)
    assert machines.processes["resumed"].returncode == 0, machines.log("resumed")
    return folder


def test_a_run_with_hostile_sites_and_killed_processes_ends_as_one_without_them(
    machines: Machines, troubled_run: Path
) -> None:
    planned = plan(read(machines.in_process_table()))
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
    assert [found[round, None, "clients"] for round in (1, 2, 3)] == [2, 1, 2]
    assert (3, "hospital-b", "samples") in found
    # It kept its state, and the update that it missed is sent with round 3.
    assert "lost its state" not in log


@pytest.mark.parametrize("round", LIES)
def test_what_a_hostile_site_sends_is_refused_with_the_reason(troubled_run: Path, round: int) -> None:
    lie, reason = LIES[round]
    lines = [
        line
        for line in (troubled_run / "run.log").read_text(encoding="utf-8").splitlines()
        if f"round {round + 1}: upload refused: client mallory" in line
    ]
    assert lines, lie
    assert all(reason in line for line in lines), lines
    assert (round + 1, "mallory", "samples") not in metrics(troubled_run)
