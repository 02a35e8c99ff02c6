"""The folder of a run: writing and reading its files.

======================  ======================================================================
``config.toml``         the configuration with all defaults
``inputs.json``         SHA-256 of data files and base weights; the configuration at the start
``environment.json``    versions, device, git commit; the run's identity
``metrics.jsonl``       one object per line: round, client, name, value
``run.log``             the messages of the run, with times
``head.safetensors``    the initial head, before round 0, if it is fully trained
``updates/``            ``0001.safetensors`` ...: the server update that each round merged
``checkpoints/``        the server's state after the last rounds and the best round
``clients/``            the state of each client between rounds
``replies/``            replies of the round in progress and of clients in flight; removed once a
                        checkpoint has all that they changed
``sums/``               with secure aggregation: the sum of each round's uploads, before it is used
``arrivals.json``       in asynchronous rounds: when clients began, and whose uploads each round merged
``progress.json``       the round and the clients in progress; removed when the run ends
``privacy.json``        with ``[privacy]``: the releases, with epsilon after each
``partition.json``      rows of each class at each client; the range of images of more than 8 bits;
                        the form of rows, if it was recognised
``stopped.json``        the reason why the run ended before its last round, if it did
``confusion.json``      the newest round's confusion matrix: rows by true and predicted class
``evaluation.json``     the number of test rows; null if the clients' validation rows are evaluated
``report.html``         the report of the run, on one page
``*.png``               the report's charts
``model/``              the final model in transformers' format
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

from fedsmoothlora.errors import StateError
from fedsmoothlora.federation.records import Metric, RoundRecord
from fedsmoothlora.storage.files import (
    is_new_or_empty,
    is_part,
    make_folder,
    read_text,
    storage_errors,
    write_text,
)
from fedsmoothlora.storage.hashed_files import write_tensors

_CONFIG, _ENVIRONMENT, _INPUTS = "config.toml", "environment.json", "inputs.json"
# The files that are written before `config.toml`; a folder with only these is not a run yet.
_WRITTEN_FIRST = ("partition.json", _ENVIRONMENT, _INPUTS)
_METRIC_KEYS = {"round", "client", "name", "value"}


@dataclass(frozen=True)
class RunFolder:
    """A run's folder at ``path``."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Make a new folder.

        A folder of a run that ended before ``config.toml`` was written is cleared and used again.

        Raises:
            FileExistsError: the folder is not empty otherwise.
            StorageError: the folder cannot be made.
        """
        if not is_new_or_empty(path):
            if not _is_unfinished(path):
                raise FileExistsError(
                    f"{path} already exists and is not empty: choose another folder, or resume the run in it "
                    f"(--resume {path})"
                )
            with storage_errors(path):
                for file in path.iterdir():
                    file.unlink()
        make_folder(path)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run's folder.

        Raises:
            FileNotFoundError: it is not a run's folder.
            StateError: the run was stopped before it began.
            StorageError: it cannot be read.
        """
        with storage_errors(path, "read"):
            missing = [name for name in (_CONFIG, _ENVIRONMENT) if not (path / name).is_file()]
            if _CONFIG in missing and _is_unfinished(path):
                raise StateError(
                    f"{path}: the run was stopped before it began, so there is nothing to resume; begin it "
                    f"with --out {path}"
                )
        if missing:
            raise FileNotFoundError(f"{path} is not a run's folder: it has no {missing[0]}")
        return cls(path)

    @property
    def config(self) -> Path:
        """The file of the configuration."""
        return self.path / _CONFIG

    @property
    def updates(self) -> Path:
        """The folder of the server updates."""
        return self.path / "updates"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def clients(self) -> Path:
        """The folder of the clients' states."""
        return self.path / "clients"

    @property
    def replies(self) -> Path:
        """The folder of the replies of the round in progress."""
        return self.path / "replies"

    @property
    def sums(self) -> Path:
        """The folder of the sums of masked uploads."""
        return self.path / "sums"

    @property
    def arrivals(self) -> Path:
        """The file of the order of arrivals."""
        return self.path / "arrivals.json"

    @property
    def privacy(self) -> Path:
        """The file of the private releases."""
        return self.path / "privacy.json"

    @property
    def progress(self) -> Path:
        """The file of the round and the clients in progress."""
        return self.path / "progress.json"

    @property
    def model(self) -> Path:
        """The folder of the final model."""
        return self.path / "model"

    @property
    def experiment(self) -> str:
        """The run's identity. Raises ``StateError`` if ``environment.json`` is unreadable or lacks it."""
        return str(self.read_json(_ENVIRONMENT, "experiment")["experiment"])

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes. Raises ``StateError`` if ``partition.json`` is unreadable or lacks them."""
        return tuple(map(str, self.read_json("partition.json", "classes")["classes"]))

    def begin(self, toml: str, inputs: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Write the files that make the folder a run's folder, from which the run can be resumed.

        Args:
            toml: the configuration.
            inputs: hashes of the data files and base weights (`fedsmoothlora.storage.inputs`).
            environment: versions and device, and the run's identity as ``experiment``.
        """
        self.write_json(_ENVIRONMENT, environment)
        self.write_json(_INPUTS, inputs)
        write_text(self.config, toml)  # last: see `_is_unfinished`

    def inputs(self) -> dict[str, Any] | None:
        """The content of ``inputs.json``; None if it was not recorded, as in older runs."""
        return self.read_json(_INPUTS) if (self.path / _INPUTS).exists() else None

    def write_json(self, name: str, table: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        write_text(self.path / name, json.dumps(table, indent=2) + "\n")

    def read_json(self, name: str, *keys: str) -> dict[str, Any]:
        """Read a JSON file. Raises ``StateError`` unless it is an object with all ``keys``."""
        path = self.path / name
        try:
            table = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            if isinstance(error, StateError):
                raise
            raise StateError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(table, dict):
            raise StateError(f"{path} is damaged: it must hold a JSON object")
        if missing := [key for key in keys if key not in table]:
            raise StateError(f"{path} is damaged: it has no {', '.join(missing)}")
        return table

    @property
    def stopped(self) -> str | None:
        """The reason why the run ended before its last round; None if it did not."""
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
        """Write the initial head."""
        if head:
            write_tensors(self.path / "head.safetensors", head)

    def append_metrics(self, record: RoundRecord) -> int:
        """Append a round's metrics to ``metrics.jsonl``, flush it to disk, and return its length in bytes.

        Raises ``StorageError`` if they cannot be written.
        """
        path = self.path / "metrics.jsonl"
        lines = [
            json.dumps({"round": record.round, "client": f.client, "name": f.name, "value": f.value})
            for f in record.metrics
        ]
        with storage_errors(path), path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def write_confusion(self, record: RoundRecord) -> None:
        """Write ``confusion.json``, the confusion matrix of the newest round."""
        if record.confusion is None:
            return
        matrix = record.confusion.tolist()
        try:
            names = list(self.classes)
        except StateError:  # a `Federation` has no such file, and a damaged one must not end a run
            names = []
        if len(names) != len(matrix):
            names = [str(label) for label in range(len(matrix))]
        self.write_json("confusion.json", {"round": record.round, "classes": names, "matrix": matrix})

    def check_not_reduced(self) -> None:
        """Raise ``StateError`` if there are metrics of rounds but no checkpoint was kept.

        To begin such a run anew would erase them.
        """
        has_rounds = any(line["round"] > 0 for line in self.metrics())
        if has_rounds and not any(self.checkpoints.glob("*.json")):
            raise StateError(
                f"{self.path}: has metrics of rounds, but no checkpoint to continue from, so it was reduced "
                "to its records; they are kept. Start a new run in another folder"
            )

    def cut_metrics(self, length: int) -> None:
        """Cut ``metrics.jsonl`` back to the length that a checkpoint recorded."""
        path = self.path / "metrics.jsonl"
        with storage_errors(path):
            if path.is_file() and path.stat().st_size > length:
                os.truncate(path, length)

    def records(self) -> list[RoundRecord]:
        """Records of finished rounds, without confusion matrices. Raises ``StateError`` as `metrics` does."""
        by_round: dict[int, list[Metric]] = {}
        for line in self.metrics():
            found = by_round.setdefault(line["round"], [])
            found.append(Metric(line["client"], line["name"], line["value"]))
        return [RoundRecord(round=round, metrics=found) for round, found in by_round.items()]

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, without an incomplete last line, which a killed run may leave.

        Raises ``StateError`` for a damaged line.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        text = read_text(path)
        lines = text[: text.rfind("\n") + 1].splitlines()
        return [_metric(path, number, line) for number, line in enumerate(lines, 1)]


def _metric(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StateError(f"{path}, line {number}: not valid JSON: {error}") from None
    if not isinstance(found, dict) or not found.keys() >= _METRIC_KEYS:
        raise StateError(f"{path}, line {number}: it must be an object with round, client, name and value")
    return found


def _is_unfinished(path: Path) -> bool:
    """Whether a folder has only files that are written before ``config.toml``, and at least one."""
    if not path.is_dir() or path.is_symlink():
        return False
    names = list(path.iterdir())
    return bool(names) and all(entry.name in _WRITTEN_FIRST or is_part(entry) for entry in names)
