"""The commands of deploy/compose.yaml on loopback: the containers' processes without the containers."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from deploy_files import DEPLOY, services, shell_commands
from machines import SITES, Machines, free_port, metrics, wait_until

from fedsmoothlora.flower.local import wait_for_port

pytest.importorskip("flwr")
pytestmark = pytest.mark.release


@pytest.fixture
def machines(tmp_path: Path, tiny_folder: Path) -> Iterator[Machines]:
    made = Machines(tmp_path, tiny_folder)
    try:
        yield made
    finally:
        made.end_all()


def on_loopback(machines: Machines, commands: str) -> str:
    """Commands of the containers with this machine's addresses in them."""
    replaced = {
        "--config my.toml": f"--config my.toml --port {machines.port}",
        "--host coordinator": "--host 127.0.0.1",
        "--host 0.0.0.0": f"--host 127.0.0.1 --port {machines.port}",
        "coordinator:8000": f"127.0.0.1:{machines.port}",
        "flower-supernode ": f"flower-supernode --port {free_port()} ",
    }
    for old, new in replaced.items():
        commands = commands.replace(old, new)
    return commands


def script(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def test_the_containers_commands_carry_out_a_run(machines: Machines) -> None:
    table = {**machines.table, "flower": {"clients": list(SITES), "wait": 120.0, "timeout": 120.0}}
    (machines.folder("coordinator") / "my.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    for site in SITES:
        machines.folder(site)
    machines.run(on_loopback(machines, f"SITES={machines.root}\n{script('prepare.sh')}"), "coordinator")
    found = services()
    machines.start(on_loopback(machines, shell_commands(found["coordinator"]["command"])), "coordinator")
    wait_for_port(machines.port, 120)
    machines.run(script("register.sh"), "coordinator")
    for site in SITES:
        commands = shell_commands(found[site]["command"])
        commands = commands.replace('/data\\"', f'{machines.data / site}.csv\\"')
        machines.start(on_loopback(machines, f"SITE={site}\n{commands}"), site)
    (last,) = re.findall(r"docker compose exec coordinator (fedsmoothlora .*)", page())
    machines.run(last, "coordinator", 480)
    run = machines.root / "coordinator" / shlex.split(last)[-1]
    wait_until("the model is written", lambda: (run / "model").is_dir(), 30)
    assert max(round for round, _, _ in metrics(run)) == table["training"]["rounds"]
    assert {client for _, client, _ in metrics(run) if client} == set(SITES)


def page() -> str:
    return (DEPLOY.parent / "docs" / "deploy.md").read_text(encoding="utf-8")
