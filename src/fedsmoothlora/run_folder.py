"""The folder of a run: what is in it, and how it is written and read.

======================  ======================================================================
``config.toml``         the configuration, every default written out
``environment.json``    versions, device, git commit
``metrics.jsonl``       one object a line: round, client, name, value
``head.safetensors``    the head as drawn, before round 0, where it is trained whole
``updates/``            ``0001.safetensors`` ...: the server update that each round merged
``*.png``               pictures
``model/``              the final model, as transformers saves it
======================  ======================================================================
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fedsmoothlora.files import write_tensors, write_text
from fedsmoothlora.lowrank import LowRank
from fedsmoothlora.methods import Products
from fedsmoothlora.rounds import RoundRecord


@dataclass(frozen=True)
class RunFolder:
    """A run's folder at ``path``."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make a new folder.

        Raises ``FileExistsError`` if there is something in it already.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} already exists and is not empty: choose another --out")
        path.mkdir(parents=True, exist_ok=True)
        (path / "updates").mkdir()
        return cls(path)

    def write_config(self, toml: str) -> None:
        """Write ``config.toml``."""
        write_text(self.path / "config.toml", toml)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Write ``environment.json``."""
        write_text(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def write_head(self, head: Mapping[str, Tensor]) -> None:
        """Write the head as drawn."""
        if head:
            write_tensors(self.path / "head.safetensors", head)

    def append_metrics(self, record: RoundRecord) -> None:
        """Append a round's figures to ``metrics.jsonl``."""
        lines = [
            json.dumps({"round": record.round, "client": f.client, "name": f.name, "value": f.value})
            for f in record.figures
        ]
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``."""
        text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def write_update(self, round: int, update: Products) -> None:
        """Write what finished round ``round`` (from 1) merged."""
        write_tensors(self._update(round), flatten(update))

    def updates(self, rounds: int) -> Iterator[Products]:
        """What the first ``rounds`` rounds merged, in order."""
        for round in range(1, rounds + 1):
            yield unflatten(load_file(self._update(round)))

    def _update(self, round: int) -> Path:
        return self.path / "updates" / f"{round:04d}.safetensors"


def flatten(update: Products) -> dict[str, Tensor]:
    """Factors by ``LAYER/B`` and ``LAYER/A``, as a tensor file holds them."""
    return {
        f"{name}/{side}": factor
        for name, product in update.items()
        for side, factor in (("B", product.B), ("A", product.A))
    }


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """The inverse of `flatten`."""
    names: Sequence[str] = [key.removesuffix("/B") for key in tensors if key.endswith("/B")]
    return {name: LowRank(tensors[f"{name}/B"], tensors[f"{name}/A"]) for name in names}
