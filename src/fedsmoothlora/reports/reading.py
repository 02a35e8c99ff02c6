"""The files of a run's folder, for a report. The half-written last line of a killed run is passed over."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Any, Literal

from fedsmoothlora.callbacks import Setback, setbacks
from fedsmoothlora.config.renamed import translated
from fedsmoothlora.errors import ReportError
from fedsmoothlora.reports.metrics import QUALITY, larger_is_better, main_metrics

Series = Mapping[int, float]
"""A metric's value by round; NaN where it was measured and was not a finite number."""

EvaluatedOn = Literal["test", "validation"]

Opener = Callable[[str, int], int]
"""Opens a file, as the ``opener`` of Python's ``open``."""

_LINES_AT_ONCE = 20_000
_LOG_BYTES = 16_384


@dataclass(frozen=True)
class Spread:
    """The smallest, middle and largest value over clients, by round."""

    low: Series
    middle: Series
    high: Series


@dataclass
class Metrics:
    """``metrics.jsonl``, by name.

    Attributes:
        server: metrics of the global model and the server.
        clients: metrics of each client.
        unreadable: lines that hold no metric, such as the half-written last one of a killed run.
    """

    server: dict[str, dict[int, float]] = field(default_factory=dict)
    clients: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    unreadable: int = 0

    @property
    def rounds(self) -> int | None:
        """The number of finished rounds; None if not even round 0 is recorded."""
        return max((round for series in self.server.values() for round in series), default=None)

    @property
    def measured_model(self) -> str:
        """The model that the server's quality metrics belong to, in words."""
        return "mean of clients’ models" if self.server.get("mean_of_clients") else "global model"

    def add(self, line: Any) -> None:
        """Add a parsed line; None, and a line that holds no metric, count as unreadable."""
        try:
            round, client, name = line["round"], line["client"], line["name"]
            value = line["value"]
            if type(round) is not int or type(name) is not str or type(value) not in (int, float):
                raise TypeError(line)
            value = float(value)
        except (KeyError, TypeError, OverflowError):
            self.unreadable += 1
            return
        if client is None:
            series = self.server.setdefault(name, {})
        else:
            series = self.clients.setdefault(name, {}).setdefault(str(client), {})
        # A round that was run again, after a resume, counts with its last value.
        series[round] = value

    def client_ids(self) -> list[str]:
        """Every client with a metric, in the order of `client_order`."""
        return sorted(
            {client for by_client in self.clients.values() for client in by_client}, key=client_order
        )

    def spread(self, name: str) -> Spread:
        """The spread over the clients that have a finite value in a round; NaN in a round without any."""
        by_round: dict[int, list[float]] = {}
        for series in self.clients.get(name, {}).values():
            for round, value in series.items():
                values = by_round.setdefault(round, [])
                if math.isfinite(value):
                    values.append(value)

        def over(statistic: Callable[[list[float]], float]) -> dict[int, float]:
            return {r: statistic(by_round[r]) if by_round[r] else math.nan for r in sorted(by_round)}

        return Spread(over(min), over(median), over(max))

    def summed(self, name: str) -> dict[int, float]:
        """The sum of the finite values over clients, by round."""
        total: dict[int, float] = {}
        for series in self.clients.get(name, {}).values():
            for round, value in series.items():
                total[round] = total.get(round, 0.0) + (value if math.isfinite(value) else 0.0)
        return dict(sorted(total.items()))


@dataclass(frozen=True)
class Partition:
    """``partition.json``: rows of every class that each client has."""

    classes: Sequence[str]
    clients: Mapping[str, Sequence[int]]
    left_out: int


@dataclass(frozen=True)
class Confusion:
    """``confusion.json``: evaluated rows by true class (row) and predicted class (column)."""

    classes: Sequence[str]
    matrix: Sequence[Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class RecordedRun:
    """The content of a run's folder; None for a file that is missing.

    Attributes:
        folder: its path.
        config: the configuration, by section.
        metrics: all metrics.
        environment: versions and the machine.
        partition: rows by client and class.
        confusion: of the newest round.
        log: the end of the log.
        evaluated_on: the rows that the metrics of the global model belong to; None if not known.
        stopped: the reason why the run ended before its last round, if it did.
    """

    folder: Path
    config: Mapping[str, Any]
    metrics: Metrics
    environment: Mapping[str, Any] | None
    partition: Partition | None
    confusion: Confusion | None
    log: str | None
    evaluated_on: EvaluatedOn | None
    stopped: str | None

    @property
    def planned_rounds(self) -> int | None:
        """``training.rounds``, as far as it is known."""
        rounds = self.setting("training", "rounds")
        return rounds if type(rounds) is int else None

    @property
    def is_finished(self) -> bool:
        """Whether the run ended as planned or for a reason that it records; also if no plan is known."""
        if self.stopped is not None:
            return True
        recorded = -1 if self.metrics.rounds is None else self.metrics.rounds
        return self.planned_rounds is None or recorded >= self.planned_rounds

    @property
    def setbacks(self) -> Sequence[Setback]:
        """The rounds after which a main metric had lost more than half of its gain."""
        found = [
            setbacks(name, self.metrics.server.get(name, {}), larger_is_better=larger_is_better(name))
            for name in main_metrics(str(self.setting("checkpoint", "best")))
        ]
        return sorted(chain.from_iterable(found), key=lambda one: one.round)

    @property
    def is_private(self) -> bool:
        """Whether the page may hold only what follows from noised releases and the test set."""
        return _is_private(self.config)

    @property
    def evaluated_rows(self) -> str:
        """A sentence on the rows that the metrics of the global model belong to; empty if not known."""
        if self.evaluated_on == "validation":
            return "On the clients’ validation rows; there is no test set."
        return "On the test set." if self.evaluated_on == "test" else ""

    def setting(self, section: str, key: str) -> Any:
        """A value of the configuration; None where it is not set."""
        table = self.config.get(section)
        return table.get(key) if isinstance(table, Mapping) else None


def client_order(client: str) -> tuple[bool, int, str]:
    """A key to sort client ids by: ``2`` before ``10``, numbers before words."""
    return (False, int(client), client) if client.isdecimal() else (True, 0, client)


def read_metrics(folder: Path) -> Metrics:
    """The metrics of the run in ``folder``; empty where it has none yet."""
    path = folder / "metrics.jsonl"
    return metrics_of(_lines(path)) if path.is_file() else Metrics()


def metrics_of(lines: Iterable[Any]) -> Metrics:
    """The metrics of parsed lines of ``metrics.jsonl``, in their order."""
    metrics = Metrics()
    for line in lines:
        metrics.add(line)
    metrics.server = {name: dict(sorted(series.items())) for name, series in metrics.server.items()}
    return metrics


def read_run(folder: Path) -> RecordedRun:
    """Read a run's folder.

    Raises ``ReportError`` if it is not one, or if a file in it is not valid.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder} is not a folder; give the folder of a run, with its config.toml")
    for name in ("config.toml", "metrics.jsonl"):
        if not (folder / name).is_file():
            raise ReportError(f"{folder} is not the folder of a run with results: {name} is missing")
    return read_files(folder, metrics_of(_lines(folder / "metrics.jsonl")))


def read_files(folder: Path, metrics: Metrics, opener: Opener | None = None) -> RecordedRun:
    """Read the files of a run's folder, apart from its metrics.

    Args:
        folder: the folder.
        metrics: the metrics of the run.
        opener: opens the files; the system's ``open`` unless given.

    Raises:
        ReportError: a file is not valid, or ``config.toml`` is missing.
    """
    try:
        config = translated(tomllib.loads(_text(folder / "config.toml", opener)))
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{folder / 'config.toml'}: cannot be read: {error}") from None
    private = _is_private(config)  # then the rows of clients and the names in the log must not be shown
    return RecordedRun(
        folder=folder,
        config=config,
        metrics=metrics,
        environment=_json(folder / "environment.json", opener),
        partition=None if private else _partition(folder / "partition.json", opener),
        confusion=read_confusion(folder, opener),
        log=None if private else _log(folder / "run.log", opener),
        stopped=_stopped(folder / "stopped.json", opener),
        evaluated_on=_evaluated_on(_json(folder / "evaluation.json", opener), config, metrics),
    )


def _is_private(config: Mapping[str, Any]) -> bool:
    privacy = config.get("privacy")
    return isinstance(privacy, Mapping) and privacy.get("unit") in ("client", "sample")


def _evaluated_on(
    recorded: Mapping[str, Any] | None, config: Mapping[str, Any], metrics: Metrics
) -> EvaluatedOn | None:
    """``evaluation.json`` if the run has one; else, the metrics and settings may leave one possibility.

    Without a test set, the metrics of the global model are means of those that the clients recorded on their
    validation rows.
    """
    if recorded is not None:
        return "validation" if recorded.get("test_rows") is None else "test"
    own_models = bool(metrics.server.get("mean_of_clients"))
    if own_models:
        return "test" if any(name.startswith("on_test_") for name in metrics.clients) else "validation"
    evaluation = config.get("evaluation")
    if isinstance(evaluation, Mapping) and evaluation.get("test") is False:
        return "validation"
    data = config.get("data")
    if isinstance(data, Mapping) and data.get("test"):
        return "test"
    validated = any(metrics.clients.get(name) for name in metrics.server if name in QUALITY)
    return None if validated else "test"


def _lines(path: Path) -> Iterator[Any]:
    """The parsed lines; None for one that is not JSON."""
    with path.open("rb") as file:
        while lines := list(islice(file, _LINES_AT_ONCE)):
            yield from parsed_lines(lines)


def parsed_lines(lines: Sequence[bytes]) -> Iterator[Any]:
    """The lines of a JSON Lines file, parsed; None for one that is not JSON. Blank lines are left out."""
    filled = [line for line in lines if line.strip()]
    # Thousands of lines as one array: several times faster than one by one.
    try:
        parsed = json.loads(b"[" + b",".join(filled) + b"]")
    except (ValueError, RecursionError):
        parsed = []
    yield from parsed if len(parsed) == len(filled) else map(_line, filled)


def _line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _text(path: Path, opener: Opener | None) -> str:
    with open(path, encoding="utf-8", opener=opener) as file:
        return file.read()


def _json(path: Path, opener: Opener | None) -> Mapping[str, Any] | None:
    """A file's JSON object; None if there is no such file."""
    try:
        found = json.loads(_text(path, opener))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ReportError(f"{path}: holds {type(found).__name__}, should be an object")
    return found


def _partition(path: Path, opener: Opener | None) -> Partition | None:
    found = _json(path, opener)
    if found is None:
        return None
    try:
        classes = [str(name) for name in found["classes"]]
        clients = {str(client): [int(n) for n in rows] for client, rows in found["clients"].items()}
        left_out = int(found.get("left_out") or 0)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(
            f"{path}: needs classes and clients (rows of each class by id): {error!r}"
        ) from None
    for client, rows in clients.items():
        if len(rows) != len(classes):
            raise ReportError(f"{path}: client {client} has {len(rows)} counts for {len(classes)} classes")
    return Partition(classes, clients, left_out) if classes and clients else None


def read_confusion(folder: Path, opener: Opener | None = None) -> Confusion | None:
    """The confusion matrix of the newest round in a run's folder; None if there is none.

    Raises ``ReportError`` if its file is damaged.
    """
    path = folder / "confusion.json"
    found = _json(path, opener)
    if found is None:
        return None
    try:
        classes = [str(name) for name in found["classes"]]
        matrix = [[int(n) for n in row] for row in found["matrix"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{path}: needs classes and matrix (rows: true class): {error!r}") from None
    if len(matrix) != len(classes) or any(len(row) != len(classes) for row in matrix):
        raise ReportError(
            f"{path}: the matrix should be {len(classes)} by {len(classes)}, one for each class"
        )
    return Confusion(classes, matrix) if classes else None


def _stopped(path: Path, opener: Opener | None) -> str | None:
    found = _json(path, opener)
    return None if found is None else str(found.get("reason"))


def _log(path: Path, opener: Opener | None) -> str | None:
    """The end of the log, from the beginning of a line on."""
    try:
        with open(path, "rb", opener=opener) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _LOG_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return None
    if size > _LOG_BYTES:
        text = text.partition("\n")[2]
    return text.strip("\n") or None
