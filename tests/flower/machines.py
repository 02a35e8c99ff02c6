"""Federations of real processes on loopback, made by the commands of docs/deploy.md."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from conftest import CLASSES, textures
from fedsmoothlora.flower.keys import write_node_key
from fedsmoothlora.flower.local import free_ports, wait_for_port
from fedsmoothlora.flower.submission import binaries

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy.md"
SITES = {"hospital-a": 40, "hospital-b": 24, "hospital-c": 32}

# What a test adds to the shipped client_app.py: it writes down every message and its reply, and lets a test
# stand in for a site's app. Nothing of it is in the package.
RECORDER = """
import importlib.util, json, os, time, uuid
from flwr.clientapp import ClientApp

HOME = Path({home!r})


def written(content):
    tables = {{name: dict(table) for name, table in content.config_records.items()}}
    arrays = {{}}
    for name, record in content.array_records.items():
        for key, array in record.items():
            file = HOME / f"{{uuid.uuid4().hex}}.bytes"
            file.write_bytes(array.data)
            arrays[f"{{name}}/{{key}}"] = [array.stype, array.dtype, str(file)]
    return {{"tables": tables, "arrays": arrays, "metrics": list(content.metric_records)}}


class Recorded(ClientApp):
    def __call__(self, message, context):
        client = context.node_config["client-id"]
        entry = {{
            "client": client, "kind": message.metadata.message_type, "down": written(message.content),
            "began": time.time(), "pid": os.getpid(),
        }}
        (HOME / f"begun-{{client}}-{{time.time_ns()}}.json").write_text(json.dumps(entry))
        stand_in = HOME / f"{{client}}.py"
        if stand_in.is_file():
            spec = importlib.util.spec_from_file_location("stand_in", stand_in)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            reply = module.answer(message, context, honest)
        else:
            reply = honest(message, context)
        entry["up"] = written(reply.content)
        entry["seconds"] = time.time() - entry["began"]
        partial = HOME / f"{{uuid.uuid4().hex}}.partial"
        partial.write_text(json.dumps(entry))
        partial.rename(HOME / f"done-{{client}}-{{time.time_ns()}}.json")
        return reply


def honest(message, context):
    from fedsmoothlora.flower.client_app import client_app

    return client_app(Path(__file__).with_name("config.toml"))(message, context)


app = Recorded()
"""


class Machines:
    """A coordinator and sites, each with a folder of its own, and the processes that run there."""

    def __init__(self, root: Path, model: Path, sites: Collection[str] = SITES) -> None:
        self.root = root
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.records = root / "records"
        self.records.mkdir()
        self.data = root / "data"
        for seed, (site, rows) in enumerate(SITES.items(), 1):
            if site in sites:
                write_table(self.data / f"{site}.csv", rows, seed)
        write_table(root / "test" / "test.csv", 64, 9)
        self.environment = {
            **os.environ,
            "PATH": f"{binaries()}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "FLWR_HOME": str(root / "flwr"),  # where it is not the coordinator's
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "COLUMNS": "200",
        }
        self.table: dict[str, Any] = {
            "name": "textures",
            "model": {"source": str(model), "image_size": 28},
            "lora": {"r": 2, "alpha": 4, "dropout": 0.1},
            "data": {"source": str(self.data), "classes": list(CLASSES), "test": str(root / "test/test.csv")},
            "partition": {"kind": "by_file"},
            "method": {"name": "fedsmoothlora", "gamma": 64, "calibration_batches": 2},
            "training": {"rounds": 2, "batch_size": 8, "lr": 0.02},
            "machine": {"threads": 1, "device": "cpu"},
        }

    def folder(self, machine: str) -> Path:
        folder = self.root / machine
        folder.mkdir(exist_ok=True)
        return folder

    def documented(self, block: str, site: str = "hospital-a") -> str:
        """The commands of a block of docs/deploy.md with this test's names in them.

        Args:
            block: the comment in its first line, up to a colon.
            site: the site in place of hospital-a.
        """
        text = DEPLOY.read_text(encoding="utf-8")
        found = re.search(rf"```sh\n# {re.escape(block)}(?::[^\n]*)?\n(.*?)```", text, re.DOTALL)
        assert found, f"docs/deploy.md has no block {block!r}"
        replaced = {
            "--config my.toml --host": f"--config my.toml --port {self.port} --host",
            "fl.example.org:8000": f"127.0.0.1:{self.port}",
            "fl.example.org": "127.0.0.1",
            "--host 0.0.0.0": f"--host 127.0.0.1 --port {self.port}",
            "--simulation --host 127.0.0.1": f"--simulation --host 127.0.0.1 --port {self.port}",
            "hospital-a": site,
            "/data/a": str(self.data / f"{site}.csv"),
        }
        commands = found[1]
        for old, new in replaced.items():
            commands = commands.replace(old, new)
        return commands.replace("flower-supernode ", f"flower-supernode --port {free_port()} ")

    def run(self, commands: str, machine: str, timeout: float = 300, fails: bool = False) -> str:
        """Run commands to their end and return what they printed; ``fails`` if they must not succeed."""
        done = subprocess.run(
            ["bash", "-euc", commands],
            cwd=self.folder(machine),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert (done.returncode != 0) == fails, f"{commands}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, commands: str, name: str, machine: str | None = None) -> None:
        """Start a service in the folder of its machine, which has its name unless given."""
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                ["bash", "-euc", commands.replace("\nflower-", "\nexec flower-")],
                cwd=self.folder(machine or name),
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def end(self, name: str, number: int = signal.SIGTERM) -> None:
        """End a service and all that it started, each by its id."""
        process = self.processes.pop(name)
        try:
            family = psutil.Process(process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        for one in (process, *family):
            try:
                one.send_signal(number)
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        psutil.wait_procs(family, timeout=10)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        for one in family:
            if one.is_running():
                one.kill()

    def ended(self, name: str) -> bool:
        return self.processes[name].poll() is not None

    def end_all(self) -> None:
        """End all services, and check that they leave no process behind, such as a site's warm process."""
        for name in list(self.processes):
            self.end(name, signal.SIGKILL)
        wait_until("nothing is left", lambda: not self.running(), 60)

    def running(self, module: str = "", site: str = "") -> list[psutil.Process]:
        """The processes of this federation, or of one module, or of one site, by their command lines."""
        words = [str(self.root), module, f'"client-id": "{site}"' if site else ""]
        return [
            one
            for one in psutil.process_iter(["cmdline"])
            if one.pid != os.getpid() and all(word in " ".join(one.info["cmdline"] or []) for word in words)
        ]

    def start_coordinator(self) -> None:
        self.start(self.documented("coordinator, a service"), "coordinator")
        wait_for_port(self.port, 60)

    def prepare(self, table: Mapping[str, Any]) -> None:
        """Give every machine the configuration and its key, and write the federation's folder."""
        keys = self.folder("coordinator") / "keys"
        keys.mkdir()
        for machine in ("coordinator", *table["flower"]["clients"]):
            (self.folder(machine) / "my.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
        for site in table["flower"]["clients"]:
            if site == "hospital-a":
                self.run(self.documented("site hospital-a, its key"), site)
            else:
                write_node_key(self.folder(site) / "site.key")
            shutil.copy(self.folder(site) / "site.key.pub", keys / f"{site}.key.pub")
        self.run(self.documented("coordinator"), "coordinator")

    def in_process_table(self) -> dict[str, Any]:
        """The configuration that the coordinator wrote, for a run in one process."""
        written = self.root / "coordinator" / "federation" / "config.toml"
        table = tomllib.loads(written.read_text(encoding="utf-8"))
        del table["flower"]
        return table

    def admit(self, site: str) -> None:
        """Give a site the coordinator's certificate, and register its key."""
        shutil.copy(self.root / "coordinator/certificates/ca.crt", self.folder(site))
        self.run(self.documented("coordinator, for every site", site), "coordinator")

    def start_site(self, site: str, also: str = "") -> None:
        """Start a site's SuperNode; ``also`` goes into its node-config."""
        commands = self.documented("site hospital-a, a service", site)
        self.start(commands.replace('state="state"', f'state="state" {also}'), site)

    def start_again(self, site: str, seconds: float = 120) -> None:
        """Start a killed site's SuperNode as its service would: again and again, until it is let in."""
        deadline = time.monotonic() + seconds
        while True:
            before = len(self.log(site))
            self.start_site(site)
            wait_until(
                f"{site} is let in or not",
                lambda: self.ended(site) or "SuperNode ID" in self.log(site)[before:],  # noqa: B023
                60,
            )
            if not self.ended(site):
                return
            assert time.monotonic() < deadline, self.log(site)[-2000:]
            self.end(site)
            time.sleep(2)

    def record(self) -> None:
        """Let the shipped app write down what it gets and answers."""
        app = self.folder("coordinator") / "federation" / "client_app.py"
        text = (
            app.read_text(encoding="utf-8")
            .split("app = ")[0]
            .replace("from fedsmoothlora.flower.client_app import client_app\n", "")
        )
        app.write_text(text + RECORDER.format(home=str(self.records)), encoding="utf-8")

    def recorded(self, kind: str = "") -> list[dict[str, Any]]:
        """The messages that were answered, in their order by client, of one kind or of all."""
        entries = [json.loads(path.read_text()) for path in sorted(self.records.glob("done-*.json"))]
        return [entry for entry in entries if kind in ("", entry["kind"])]

    def a_run(self, out: str, key: str = "out") -> str:
        """The documented command of a run, without the report."""
        commands = self.documented("coordinator, a run").replace("runs/xrays", out)
        return commands.replace("--out", f"--{key}").partition("fedsmoothlora report")[0]


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


def free_port() -> int:
    """A port of loopback that nobody has right now; to be taken at once."""
    return free_ports(1)[0]


def write_table(file: Path, rows: int, seed: int) -> None:
    """A CSV file of textures, with its images beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    raw = textures(rows, seed)
    with file.open("w", newline="", encoding="utf-8") as text:
        table = csv.writer(text)
        table.writerow(["image", "label"])
        for row in range(rows):
            name = f"{file.stem}-{row}.png"
            Image.fromarray(raw.pixels[row]).save(file.parent / name)
            table.writerow([name, CLASSES[raw.labels[row]]])


def wait_until(what: str, true: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"after {seconds} s: {what}"
        time.sleep(0.1)
