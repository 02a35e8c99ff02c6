"""The wheel holds all that the package reads, and works without the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "fedsmoothlora"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network."""
    (built,) = WheelBuilder(str(ROOT)).build(
        directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"]
    )
    return Path(built)


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    ours = {f"fedsmoothlora/{path.relative_to(PACKAGE).as_posix()}" for path in files}

    assert {name for name in names if name.startswith("fedsmoothlora/")} == ours
    assert {Path(name).suffix for name in ours} >= {".toml", ".md", ".css", ".jinja", ".typed"}
    assert all("fedsmoothlora" in name.partition("/")[0] for name in names), "nothing beside the package"


def test_the_metadata_have_the_command_the_licence_and_no_path(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (folder,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(f"{folder}/METADATA").decode()

    assert "fedsmoothlora = fedsmoothlora.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert f"{folder}/licenses/LICENSE" in archive.namelist()
    assert "Requires-Dist: transformers!=5.4.*,<6,>=5.0" in metadata
    for version in ("3.11", "3.12", "3.13"):
        assert f"Classifier: Programming Language :: Python :: {version}" in metadata
    assert str(ROOT) not in metadata


@pytest.mark.release
def test_the_installed_wheel_runs_a_recipe(wheel: Path, tmp_path: Path) -> None:
    """In an empty environment, with the tested versions and the extra ``packages``."""
    venv.create(tmp_path / "environment", with_pip=True)
    binaries = tmp_path / "environment" / ("Scripts" if os.name == "nt" else "bin")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def call(*command: str) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    python = str(binaries / Path(sys.executable).name)
    constraints = ["-c", str(ROOT / "constraints.txt")]
    # pip would compile all files of torch, of which few are imported.
    call(python, "-m", "pip", "install", "--quiet", "--no-compile", *constraints, f"{wheel}[packages]")
    installed = call(python, "-c", "import fedsmoothlora; print(fedsmoothlora.__file__)").strip()
    assert installed.startswith(str(tmp_path))

    small = ["training.rounds=1", "data.train_rows=200", "data.test_rows=50", "partition.min_size=1"]
    # Threads that wait for each other are slow beside other processes.
    small.append("machine.threads=1")
    changes = [part for change in small for part in ("--set", change)]
    call(str(binaries / "fedsmoothlora"), "run", "quickstart", *changes, "--out", "run")

    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["round"] for line in lines} == {0, 1}
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "run" / "model" / "README.md").is_file()
