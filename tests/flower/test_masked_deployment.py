"""Secure aggregation among real processes, by the commands of docs/deploy.md, with a site that dies."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from machines import SITES, Machines, metrics
from rich.console import Console

from fedsmoothlora import run

pytest.importorskip("flwr")
pytestmark = pytest.mark.slow

STAGES = ["query.advertise", "query.share", "train.masked", "query.confirm", "query.reveal"]
# The process of the site's app ends in the second round, after it has shared its keys.
DYING_SITE = """
import os


def answer(message, context, honest):
    if message.metadata.message_type == "train.masked" and message.content["fields"]["round"] == 1:
        os._exit(1)
    return honest(message, context)
"""


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[Machines]:
    made = Machines(tmp_path_factory.mktemp("masked"), tiny_folder)
    made.environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = "0.1"
    table = {
        **made.table,
        "method": {"name": "fedit"},
        "privacy": {"secure_aggregation": True, "most_rows": 40},
        "flower": {"clients": list(SITES), "wait": 240.0, "timeout": 240.0},
    }
    try:
        made.prepare(table)
        made.record()
        made.start_coordinator()
        for site in SITES:
            made.admit(site)
            shutil.copytree(made.root / "coordinator" / "keys", made.folder(site) / "keys")
            said = made.run(made.documented("site hospital-a, the sites that it trusts", site), site)
            assert "hospital-b: SHA256:" in said
            made.start_site(site, 'key="site.key" sites="sites.toml"')
        yield made
    finally:
        made.end_all()


def test_a_run_whose_coordinator_sees_sums_only_and_whose_site_dies(machines: Machines) -> None:
    (machines.records / "hospital-c.py").write_text(DYING_SITE, encoding="utf-8")
    machines.run(machines.a_run("runs/masked"), "coordinator", 480)
    folder = machines.root / "coordinator" / "runs" / "masked"

    found = metrics(folder)
    assert [found[round, None, "clients"] for round in (1, 2)] == [3, 2]
    assert not [key for key in found if key[1] is not None]
    table = machines.in_process_table()
    del table["privacy"]
    right = metrics(run(table, out=machines.root / "in-process", console=Console(quiet=True)).folder)
    for name in ("loss", "accuracy"):
        assert found[1, None, name] == pytest.approx(right[1, None, name], rel=1e-4)

    entries = machines.recorded()
    asked = [entry["kind"] for entry in entries if entry["client"] == "hospital-a"]
    assert asked == ["query.agree", *STAGES, *STAGES, "query.end"]
    for entry in entries:
        up = entry["up"]
        assert up["metrics"] == []
        assert up["tables"].pop("status") == {"status": "done"}
        info = up["tables"].pop("site_info", {"samples": 1, "validation": 0, "histogram": []})
        assert (info["samples"], info["validation"], info["histogram"]) == (1, 0, [])
        assert up["tables"] == ({"fields": {}} if up["arrays"] else {})
        if entry["kind"] == "train.masked":  # integers without any structure
            ((_, _, file),) = up["arrays"].values()
            data = Path(file).read_bytes()
            assert len(set(data)) == 256
    kept = json.loads((folder / "sums" / "0002-0.json").read_text())
    assert (kept["asked"], kept["summed"]) == (sorted(SITES), ["hospital-a", "hospital-b"])
