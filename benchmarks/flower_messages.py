"""Seconds of a Flower message besides its work, on loopback, with and without a warm process."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import Row
from fedsmoothlora.config import read
from fedsmoothlora.flower.local import on_loopback
from fedsmoothlora.flower.submission import run_app
from fedsmoothlora.runs.planning import plan

_ROUNDS = 10
_WORK = ("metrics:seconds_start", "metrics:seconds_training", "metrics:seconds_upload")
# The shipped app, which also writes down its times. A process's start is known in ticks since boot.
_TIMED = """
import json, os, time
from pathlib import Path
from flwr.clientapp import ClientApp
from fedsmoothlora.flower.client_app import client_app


class Timed(ClientApp):
    def __call__(self, message, context):
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        process = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
        processor, began = time.process_time(), time.monotonic()
        reply = client_app(Path(__file__).with_name("config.toml"))(message, context)
        app, app_processor = time.monotonic() - began, time.process_time() - processor
        tables = {{name: dict(table) for name, table in reply.content.config_records.items()}}
        line = {{
            "kind": message.metadata.message_type, "process": process, "processor": processor, "app": app,
            "app_processor": app_processor, "fields": tables.get("fields", {{}}),
        }}
        with open({out!r}, "a") as file:
            file.write(json.dumps(line) + "\\n")
        return reply


app = Timed()
"""


def rows() -> Iterator[Row]:
    """A quickstart of one client with ten short rounds."""
    warm, cold = _messages(warm=True), _messages(warm=False)
    parts = {
        "a message besides its work": (lambda one: one["process"] + one["app"] - _work(one), "under 1 s"),
        "of which Flower's process until it calls the app": (lambda one: one["process"], ""),
        "of which the app": (lambda one: one["app"] - _work(one), ""),
        "processor time of Flower's process until it calls the app": (lambda one: one["processor"], ""),
        "processor time of the app in Flower's process": (lambda one: one["app_processor"], ""),
    }
    for name, (part, target) in parts.items():
        value, against = (statistics.median(map(part, messages)) for messages in (warm, cold))
        yield Row(name=f"{name}: warm against cold", value=value, unit="s", against=against, target=target)


def _messages(*, warm: bool) -> Sequence[dict[str, Any]]:
    """The times of the messages of ten rounds."""
    config = read(
        "quickstart",
        {
            "training.rounds": _ROUNDS,
            "training.steps": 2,
            "training.epochs": None,
            "partition.clients": 1,
            "machine.threads": 1,
            "data.test_rows": 100,
            "flower.warm": warm,
        },
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary) / "run", Path(temporary) / "messages.jsonl"
        clients = list(plan(config).partition.clients)
        with on_loopback(config, clients, folder / "clients") as app:
            (app / "client_app.py").write_text(_TIMED.format(out=str(out)), encoding="utf-8")
            run_app(app, out=folder)
        found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return [one for one in found if one["kind"] == "train"]


def _work(message: dict[str, Any]) -> float:
    return sum(message["fields"][name] for name in _WORK)
