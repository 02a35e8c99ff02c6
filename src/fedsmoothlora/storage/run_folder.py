"""The folder of a run: what is in it, and how it is written and read.

======================  ======================================================================
``config.toml``         the configuration, every default written out
``environment.json``    versions, device, git commit; the run's identity
``metrics.jsonl``       one object a line: round, client, name, value
``run.log``             what was said, with times
``head.safetensors``    the head as drawn, before round 0, where it is trained whole
``updates/``            ``0001.safetensors`` ...: the server update that each round merged
``checkpoints/``        the server's state after the last rounds and the best
``clients/``            what each client keeps between rounds
``partition.json``      rows of each class at each client; the range of images of more than 8 bits
``stopped.json``        why the run ended before its last round, if it did
``confusion.json``      the newest round's rows by true and predicted class
``evaluation.json``     the number of test rows; null if the clients' validation rows are evaluated
``report.html``         all of it on one page
``*.png``               pictures
``model/``              the final model, as transformers saves it
======================  ======================================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsmoothlora.errors import StateError, StorageError
from fedsmoothlora.federation.records import Metric, RoundRecord
from fedsmoothlora.storage.files import write_text
from fedsmoothlora.storage.hashed_files import write_tensors


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
            raise FileExistsError(
                f"{path} already exists and is not empty: choose another folder, or resume the run in it "
                f"(--resume {path})"
            )
        path.mkdir(parents=True, exist_ok=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run's folder.

        Raises ``FileNotFoundError`` if it is not one.
        """
        for name in ("config.toml", "environment.json"):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path} is not a run's folder: it has no {name}")
        return cls(path)

    @property
    def updates(self) -> Path:
        """Where server updates lie."""
        return self.path / "updates"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def clients(self) -> Path:
        """Where clients' states lie."""
        return self.path / "clients"

    @property
    def model(self) -> Path:
        """Where the final model lies."""
        return self.path / "model"

    def write_config(self, toml: str) -> None:
        """Write ``config.toml``."""
        write_text(self.path / "config.toml", toml)

    def write_json(self, name: str, table: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        write_text(self.path / name, json.dumps(table, indent=2) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file. Raises ``StateError`` where it is missing or altered."""
        path = self.path / name
        try:
            table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StateError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise StateError(f"{path} is not valid JSON: {error}") from None
        return table

    @property
    def stopped(self) -> str | None:
        """Why the run ended before its last round; None if it did not."""
        if not (self.path / "stopped.json").is_file():
            return None
        return str(self.read_json("stopped.json")["reason"])

    def write_stopped(self, reason: str | None) -> None:
        """Write ``stopped.json``; remove it if ``reason`` is None."""
        if reason is None:
            (self.path / "stopped.json").unlink(missing_ok=True)
        else:
            self.write_json("stopped.json", {"reason": reason})

    def write_head(self, head: Mapping[str, Tensor]) -> None:
        """Write the head as drawn."""
        if head:
            write_tensors(self.path / "head.safetensors", head)

    def append_metrics(self, record: RoundRecord) -> int:
        """Append a round's metrics to ``metrics.jsonl``, flushed to disk; the file's length in bytes.

        Raises ``StorageError`` if they cannot be written.
        """
        path = self.path / "metrics.jsonl"
        lines = [
            json.dumps({"round": record.round, "client": f.client, "name": f.name, "value": f.value})
            for f in record.metrics
        ]
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
                file.flush()
                os.fsync(file.fileno())
                return file.tell()
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from error

    def write_confusion(self, record: RoundRecord) -> None:
        """Write ``confusion.json``: the newest round's, rows by true and predicted class."""
        if record.confusion is None:
            return
        matrix = record.confusion.tolist()
        names = [str(label) for label in range(len(matrix))]
        if (self.path / "partition.json").is_file():
            names = self.read_json("partition.json")["classes"]
        self.write_json("confusion.json", {"round": record.round, "classes": names, "matrix": matrix})

    def cut_metrics(self, length: int) -> None:
        """Cut ``metrics.jsonl`` back to what a checkpoint knew of."""
        path = self.path / "metrics.jsonl"
        if path.is_file() and path.stat().st_size > length:
            os.truncate(path, length)

    def records(self) -> list[RoundRecord]:
        """The records of finished rounds, without confusion matrices. Raises ``StateError`` as `metrics`."""
        by_round: dict[int, list[Metric]] = {}
        for line in self.metrics():
            found = by_round.setdefault(line["round"], [])
            found.append(Metric(line["client"], line["name"], line["value"]))
        return [RoundRecord(round=round, metrics=found) for round, found in by_round.items()]

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``; a last line that a killed run left half written is passed over.

        Raises ``StateError`` for a line that was altered.
        """
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return []
        try:
            text = path.read_text(encoding="utf-8")
            return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        except ValueError as error:
            raise StateError(f"{path} has a line that is not valid JSON: {error}") from None
