"""A rehearsal on one machine: ``fedsmoothlora run CONFIG --engine flower``."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import psutil
import pytest
import tomli_w
from machines import Machines
from rich.console import Console
from safetensors.torch import load_file

from fedsmoothlora import run
from fedsmoothlora.config import read

pytest.importorskip("flwr")
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.flower.local import run_locally
from fedsmoothlora.flower.submission import binaries


@pytest.mark.slow
def test_the_command_trains_what_one_process_trains_and_leaves_no_process_behind(
    tmp_path: Path, tiny_folder: Path
) -> None:
    table = Machines(tmp_path, tiny_folder).table
    table |= {"partition": {"kind": "iid", "clients": 2}, "training": {**table["training"], "rounds": 1}}
    (tmp_path / "my.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    done = subprocess.run(
        [binaries() / "fedsmoothlora", "run", "my.toml", "--engine", "flower", "--out", "run"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 1/1" in done.stdout
    left = [one.info for one in psutil.process_iter(["pid", "cmdline"]) if str(tmp_path) in str(one.info)]
    assert left == []
    one = run(table, out=tmp_path / "one", console=Console(quiet=True)).folder
    right, found = (load_file(path / "model" / "model.safetensors") for path in (one, tmp_path / "run"))
    for name, value in right.items():
        assert float((value - found[name]).norm()) <= 1e-5 * float(value.norm()), name
    # Each client's state is in the run's folder, so that the run can be resumed.
    assert len(list((tmp_path / "run" / "clients").glob("*/clients/*/state.json"))) == 2


@pytest.mark.release
def test_the_recipe_of_private_hospitals_runs_by_the_documented_command(tmp_path: Path) -> None:
    tutorial = Path(__file__).parents[2] / "docs" / "tutorials" / "private-hospitals.md"
    (command,) = re.findall(r"^fedsmoothlora run private-hospitals .*$", tutorial.read_text(), re.M)
    small = ["--set", "training.rounds=1", "--set", "data.train_rows=200", "--set", "data.test_rows=50"]
    done = subprocess.run(
        [binaries() / "fedsmoothlora", *shlex.split(command)[1:], *small],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of 3 clients in a round, the coordinator learns the sum of at least 2" in done.stdout
    assert "round 1/1" in done.stdout
    folder = tmp_path / "runs" / "private"
    assert sorted(path.name for path in (folder / "sums").glob("*.json")) == [
        *("0001-0.json", "0001-1.json", "attempts.json", "begun.json")
    ]
    assert '"client": "' not in (folder / "metrics.jsonl").read_text()


def test_sites_with_data_of_their_own_are_not_for_one_machine(tmp_path: Path, tiny_folder: Path) -> None:
    table = {**Machines(tmp_path, tiny_folder).table, "flower": {"clients": ["hospital-a"]}}
    with pytest.raises(ConfigError, match=r"docs/deploy\.md"):
        run_locally(read(table), out=tmp_path / "run")
