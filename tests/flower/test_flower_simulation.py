"""Flower's simulation: many clients as Ray actors, by the recipe of docs/deploy.md."""

import json
import re
from pathlib import Path

import pytest
import tomli_w
from machines import Machines, free_port
from rich.console import Console
from safetensors.torch import load_file

from fedsmoothlora import run
from fedsmoothlora.flower.local import wait_for_port

pytest.importorskip("flwr")
pytestmark = pytest.mark.slow


def metrics(folder: Path) -> dict[tuple[int, str | None, str], float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {
        (line["round"], line["client"], line["name"]): line["value"]
        for line in lines
        if not line["name"].startswith("seconds")
    }


def test_the_simulation_recipe_trains_what_one_process_trains(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path
) -> None:
    machines = Machines(tmp_path_factory.mktemp("simulation"), tiny_folder)
    # Sites validate the global model, and half of them miss a round.
    machines.table |= {
        "data": {"source": str(machines.data), "validation": 0.2},
        "partition": {"kind": "iid", "clients": 4},
        "participation": {"clients": 2},
        "training": {**machines.table["training"], "rounds": 3},
    }
    folder = machines.folder("simulation")
    (folder / "my.toml").write_text(tomli_w.dumps(machines.table), encoding="utf-8")
    start, _, service = machines.documented("simulation").partition("set -a")
    try:
        machines.run(start, "simulation")
        machines.start(f"set -a{service}", "simulation")
        wait_for_port(machines.port, 60)
        machines.run(machines.documented("simulation, in another terminal"), "simulation", 240)
    finally:
        machines.end_all()
    many = folder / "runs" / "many"
    one = run(machines.table, out=machines.root / "one", console=Console(quiet=True)).folder
    expected, found = (load_file(path / "model" / "model.safetensors") for path in (one, many))
    for name, value in expected.items():
        assert float((value - found[name]).norm()) <= 1e-5 * float(value.norm()), name
    right, got = metrics(one), metrics(many)
    assert {key for key in got if key[2] != "bytes_down_validation"} == right.keys()
    for key, value in right.items():
        if key[2] != "bytes_down":  # what validating brings need not be sent again
            assert got[key] == pytest.approx(value, rel=1e-4), key


def test_flwr_run_takes_the_app_as_it_is(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> None:
    """By the commands of docs/how-to/from-flower.md; Flower starts its SuperLink by itself."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "from-flower.md"
    (commands,) = re.findall(r"```sh\n(# simulation by flwr run\n.*?)```", page.read_text("utf-8"), re.DOTALL)
    machines = Machines(tmp_path_factory.mktemp("simulation"), tiny_folder)
    machines.table |= {
        "data": {"source": str(machines.data), "validation": 0.2},
        "partition": {"kind": "iid", "clients": 2},
        "training": {**machines.table["training"], "rounds": 1},
    }
    for name in ("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", "FLWR_LOCAL_CONTROL_API_PORT"):
        machines.environment[name] = str(free_port())
    (machines.folder("simulation") / "my.toml").write_text(tomli_w.dumps(machines.table), encoding="utf-8")
    try:
        shown = machines.run(commands.replace("num-supernodes=4", "num-supernodes=2"), "simulation", 600)
    finally:
        for one in machines.running():
            one.kill()
        machines.end_all()
    assert "round 1/1" in shown
    (folder,) = (machines.folder("simulation") / "runs").iterdir()
    assert {key[0] for key in metrics(folder)} == {0, 1}
