"""Every block of docs/extending.md: the files are found where the page puts them, and their runs finish."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fedsmoothlora

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
CLASSES = 3


@dataclass(frozen=True)
class Block:
    """A fenced block; ``path`` is the file that its first line names, if it names one."""

    text: str

    @property
    def path(self) -> str | None:
        named = re.match(r"# (\S+\.(?:py|toml))\n", self.text)
        return named[1] if named else None

    @property
    def lines_of_code(self) -> int:
        lines = map(str.strip, self.text.splitlines())
        return sum(bool(line) and not line.startswith("#") for line in lines)


FENCED = re.compile(r"^```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [Block(text) for text in FENCED.findall(PAGE.read_text("utf-8"))]
FILES = {block.path: block for block in BLOCKS if block.path is not None}
USE = next(block for block in BLOCKS if block.path is None)


# Run where the extended package is imported. The method's module imports torch, as a user's may.
RUN = """
import sys
from fedsmoothlora import tasks
from fedsmoothlora.data import partitioning

print(*tasks.names(), *partitioning.names())
assert "torch" not in sys.modules, "a listed file imports torch"

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.cli import catalogue
from fedsmoothlora.config import read
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.runs.planning import build, plan

for kind in ("methods", "models", "datasets"):
    print(*(row[0] for row in catalogue.entries(kind)[1]))
simulation = build(plan(read("extended.toml")))
records = list(run_rounds(simulation, Callback()))
print(type(simulation.learner.objective).__name__, len(records), *simulation.clients)
"""


def install_method(folder: Path) -> None:
    """The module of the page's method, as an installed package that declares the page's entry point."""
    info = folder / "mymethod-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "mymethod.py").write_text(FILES["mymethod.py"].text, "utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mymethod\nVersion: 1.0\n")
    declared = tomllib.loads(FILES["pyproject.toml"].text)["project"]["entry-points"]
    ((group, entries),) = declared.items()
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def extended_package(folder: Path) -> Path:
    """A copy of the package with the page's partition, data set, model and task."""
    source = Path(fedsmoothlora.__file__).parent
    shutil.copytree(source, folder / "src" / source.name)
    for path, block in FILES.items():
        if path.startswith("src/"):
            assert (folder / path).parent.is_dir(), f"{path}: the package has no such folder"
            assert not (folder / path).exists(), f"{path}: the package has this file"
            (folder / path).write_text(block.text, "utf-8")
    return folder / "src"


class Attentive(nn.Module):
    """One attention layer; returns logits."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.classifier = nn.Linear(12, CLASSES)

    def forward(self, tokens: Tensor, /) -> Tensor:  # (rows, 4, 12)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        return self.classifier((tokens + (q @ k.mT / 12**0.5).softmax(dim=-1) @ v).mean(dim=1))


def separable(rows: int, seed: int) -> TensorDataset:
    """Rows around one centre a class."""
    centres = torch.randn(CLASSES, 4, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(rows) % CLASSES
    noise = torch.randn(rows, 4, 12, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(centres[labels] + 0.3 * noise, labels)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.path or "use of the method" for block in BLOCKS])
def test_an_example_has_fewer_than_forty_lines(block: Block) -> None:
    assert 0 < block.lines_of_code < 40


def test_a_method_of_ones_own_trains_a_federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mymethod.py").write_text(FILES["mymethod.py"].text, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Attentive()
    names = {
        "model": model,
        "clients": {name: separable(30, seed) for seed, name in enumerate(("north", "south"), 1)},
        "test": separable(30, 9),
    }
    try:
        exec(compile(USE.text, str(PAGE), "exec"), names)
    finally:
        sys.modules.pop("mymethod", None)
    losses = names["result"].values("loss")
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    config = (tmp_path / "runs" / "mymethod" / "config.toml").read_text()
    assert '[method]\nname = "mymethod"\ngamma = 64.0\n' in config


@pytest.mark.slow
def test_files_in_the_folders_of_the_package_are_used_by_name(tmp_path: Path) -> None:
    install_method(tmp_path / "site-packages")
    package = extended_package(tmp_path)
    (tmp_path / "extended.toml").write_text(FILES["extended.toml"].text, "utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (package, tmp_path / "site-packages"))),
        "FEDSMOOTHLORA_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    *listed, trained = done.stdout.splitlines()
    names = {"chronological", "smoothed-image-classification", "mymethod", "pkg:tiny-vit", "pkg:digits"}
    assert names <= set(" ".join(listed).split())
    assert trained == "Smoothed 2 0 1 2"


def test_the_page_s_callback_ends_a_run(toy_table: dict[str, Any], tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(compile(FILES["timelimit.py"].text, "timelimit.py", "exec"), names)

    result = fedsmoothlora.run(
        toy_table,
        {"training.rounds": 2},
        out=tmp_path / "run",
        callbacks=[names["TimeLimit"](0.0)],
        outputs=False,
    )

    assert result.rounds == 0
    assert result.stopped is not None
    assert "of 0 minutes" in result.stopped
