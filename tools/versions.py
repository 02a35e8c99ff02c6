"""Test the package with the lowest, the pinned and the newest versions of the libraries that it is built on.

``python -m tools.versions`` makes an environment for each row in ``.versions/`` and runs in it the fast tests
and a run that is exported. ``python -m tools.versions lowest`` runs one row, and ``--list`` shows them. A row
that needs another Python than those installed, or another torch, is marked "not run here" unless ``--all`` is
given: other builds of torch bring CUDA's libraries, gigabytes each.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = ROOT / ".versions"
# These follow transformers and PEFT, so that they are free where those are.
_FOLLOWING = ("transformers", "peft", "tokenizers", "huggingface_hub", "hf-xet")
# As `make test` runs them.
_QUICKLY = ("-q", "-n", "2", "--dist", "worksteal")
_SMALL = (
    *("training.rounds=1", "data.train_rows=200", "data.test_rows=50", "partition.min_size=1"),
    "machine.threads=1",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One combination of versions.

    Attributes:
        name: its name.
        pins: requirements that replace those of ``constraints.txt``.
        constrained: whether all other packages have the versions of ``constraints.txt``.
        python: the version of Python; that of this process unless given.
        torch: the version of torch; the pinned one unless given.
    """

    name: str
    pins: tuple[str, ...] = ()
    constrained: bool = True
    python: str | None = None
    torch: str | None = None

    def missing(self, *, everything: bool) -> str | None:
        """The reason why the row is not run here; None if it is."""
        if self.torch is not None and not everything:
            return f"torch {self.torch} (--all)"
        if self.python is not None and _interpreter(self.python) is None:
            return f"no Python {self.python}"
        return None

    def constraints(self) -> str:
        """The content of the row's constraints file."""
        pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        lines = [line for line in pinned if not line.startswith("#")]
        torch = [line for line in lines if line.startswith("torch==")]
        if not self.constrained:
            lines = torch
        if self.torch is not None:
            lines = [line for line in lines if line not in torch] + [f"torch=={self.torch}"]
        if self.pins:
            lines = [line for line in lines if re.split("==", line)[0] not in _FOLLOWING]
        return "\n".join([*lines, *self.pins]) + "\n"


ROWS = (
    Row(name="lowest", pins=("transformers==5.0.*", "peft==0.18.*")),
    Row(name="pinned"),
    Row(name="newest", constrained=False),
    Row(name="python-3.12", python="3.12"),
    Row(name="python-3.13", python="3.13"),
    Row(name="lowest-torch", pins=("transformers==5.0.*", "peft==0.18.*"), torch="2.6.*"),
)


def test(row: Row) -> bool:
    """Test a row in an environment of its own; whether it passed."""
    folder = PLACE / row.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(row.constraints(), encoding="utf-8")
    python = _interpreter(row.python) if row.python is not None else sys.executable
    assert python is not None
    binaries = folder / "environment" / "bin"
    own = str(binaries / "python")
    install = ["-m", "pip", "install", "--quiet", "--no-compile", "-c", str(constraints)]
    run, adapter = str(folder / "run"), str(folder / "adapter")
    changes = [part for change in _SMALL for part in ("--set", change)]
    steps = (
        [python, "-m", "venv", str(folder / "environment")],
        [own, *install, "-e", ".[dev]", "hatchling"],
        [own, "-m", "pip", "list", "--format", "freeze"],
        [own, "-m", "pytest", *_QUICKLY, "-p", "no:cacheprovider", "-m", "not slow and not release"],
        [str(binaries / "fedsmoothlora"), "run", "quickstart", *changes, "--out", run],
        [str(binaries / "fedsmoothlora"), "export", run, "--as", "adapter", "--out", adapter],
        [own, "-c", f"import fedsmoothlora; fedsmoothlora.load_adapter({adapter!r})"],
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return all(subprocess.run(step, cwd=ROOT, env=environment).returncode == 0 for step in steps)


def _interpreter(version: str) -> str | None:
    """The path of a Python of this version that works; None if there is none."""
    found = shutil.which(f"python{version}")
    if found is None or subprocess.run([found, "--version"], capture_output=True).returncode:
        return None
    return found


def main() -> int:
    """Test the rows; 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.versions", description="Test other versions.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names of rows; all unless given")
    parser.add_argument("--all", action="store_true", help="also rows that need another torch")
    parser.add_argument("--list", action="store_true", help="show the rows")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.rows) - {row.name for row in ROWS}):
        parser.error(f"there is no row {unknown[0]}; there are {', '.join(row.name for row in ROWS)}")
    results = {}
    for row in ROWS:
        if arguments.rows and row.name not in arguments.rows:
            continue
        if (reason := row.missing(everything=arguments.all)) is not None:
            results[row.name] = f"not run here: {reason}"
        elif arguments.list:
            results[row.name] = ", ".join(row.pins) or ("constraints.txt" if row.constrained else "no pins")
        else:
            results[row.name] = "passed" if test(row) else "FAILED"
    for name, result in results.items():
        print(f"{name:14} {result}")
    return int("FAILED" in results.values())


if __name__ == "__main__":
    sys.exit(main())
