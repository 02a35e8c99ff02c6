"""A whole run: from a configuration to a folder with its metrics, pictures and model."""

from __future__ import annotations

import shutil
import signal
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from fedsmoothlora.config import Config, ConfigError, read
from fedsmoothlora.environment import environment
from fedsmoothlora.export import save_merged
from fedsmoothlora.federation import Plan, build, plan
from fedsmoothlora.pictures import draw_curves
from fedsmoothlora.progress import ConsoleWatcher
from fedsmoothlora.rounds import FederationStoppedError, InterruptedRunError, Simulation, run_rounds
from fedsmoothlora.run_folder import RunFolder
from fedsmoothlora.state import Checkpoints, StateError, StoredStates, StoredUpdates, restore


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to.

    Attributes:
        folder: the run's folder.
        metrics: every line of its ``metrics.jsonl``: round, client, name, value.
    """

    folder: Path
    metrics: list[dict[str, Any]]

    def values(self, name: str) -> list[float]:
        """A figure of the global model by round."""
        return [line["value"] for line in self.metrics if line["client"] is None and line["name"] == name]

    @property
    def accuracy(self) -> float:
        """Accuracy of the final global model."""
        return self.values("accuracy")[-1]


def run(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    console: Console | None = None,
) -> Result:
    """Run a federation in this process.

    Args:
        config: a TOML file, a recipe's name, a table, or a configuration that was read before.
        overrides: values to put in place of the configuration's own, by dotted key:
            ``{"training.rounds": 3}``.
        out: the run's folder, new or empty; ``runs/NAME-TIME`` unless given.
        resume: the folder of a run to go on with, in place of ``out``. ``config`` may be left out; given,
            it must not change the results.
        console: where progress is shown; standard output unless given.

    Returns:
        The folder and its metrics.

    Raises:
        ConfigError: a value cannot be right, ``out`` is in use, or a resumed run's mathematics would change.
            Nothing was trained.
        PackageError: a package that ships the model or the data cannot be had.
        StateError: no checkpoint of a resumed run can be used.
        FederationStoppedError: too few uploads could be used in a round.
        InterruptedRunError: Ctrl-C; the folder can be resumed.
    """
    config = _resumed_config(config, overrides, Path(resume)) if resume else _config(config, overrides)
    console = console or Console()
    _quiet_libraries()
    torch.set_num_threads(config.machine.threads)
    with ConsoleWatcher(console) as watcher, _stopping(watcher) as should_stop:
        planned = plan(config)
        folder = RunFolder.open(Path(resume)) if resume else _new_folder(config, out, planned)
        simulation = build(planned)
        simulation.should_stop = should_stop
        _say_what_is_run(watcher, planned, simulation, folder)
        try:
            _run_and_keep(simulation, config, folder, watcher)
        except (InterruptedRunError, FederationStoppedError):
            watcher.note(f"to go on: fedsmoothlora run --resume {folder.path}")
            raise
        pictures = draw_curves(folder.metrics(), folder.path)
        if not folder.model.exists():
            save_merged(simulation, planned, folder.model)
    console.print(
        f"pictures: {', '.join(str(picture) for picture in pictures)}\nmodel:    {folder.model}",
        highlight=False,
        soft_wrap=True,
    )
    return Result(folder=folder.path, metrics=folder.metrics())


def _run_and_keep(simulation: Simulation, config: Config, folder: RunFolder, watcher: ConsoleWatcher) -> None:
    """Run the rounds that are left, with a checkpoint after each."""
    server = simulation.server
    server.experiment = folder.read_json("environment.json")["experiment"]
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    updates, progress = _restored(simulation, checkpoints, folder, watcher)
    server.updates = updates
    simulation.states = StoredStates(folder.clients, server.experiment)
    sign = -1.0 if config.checkpoint.best == "loss" else 1.0
    for record in run_rounds(simulation, watcher, resumed=progress["best_score"] is not None):
        value = record.value(config.checkpoint.best)
        score = -float("inf") if value is None else sign * value
        if progress["best_score"] is None or score > progress["best_score"]:
            progress |= {"best_score": score, "best_round": record.round}
        progress["metrics_length"] = folder.append_metrics(record)
        checkpoints.save(server, updates, progress)
        watcher.record(record, server.rounds)


def _restored(
    simulation: Simulation, checkpoints: Checkpoints, folder: RunFolder, watcher: ConsoleWatcher
) -> tuple[StoredUpdates, dict[str, Any]]:
    """Take up the newest checkpoint that is whole; without any, begin at the beginning."""
    _remove_parts(folder.path)
    problems: list[str] = []
    for path in checkpoints.newest_first():
        try:
            checkpoint, tensors, updates = checkpoints.load(path, folder.updates)
        except StateError as error:
            problems.append(str(error))
            watcher.note(f"{error}; the checkpoint before it is used")
            continue
        restore(simulation.server, checkpoint, tensors, updates)
        for update in updates:
            simulation.learner.model.backbone.merge(update)
        progress = dict(checkpoint.table["progress"])
        folder.cut_metrics(progress["metrics_length"])
        watcher.note(f"resumed after round {checkpoint.round} of {simulation.server.rounds}")
        return updates, progress
    if problems:
        raise StateError(f"no checkpoint in {folder.checkpoints} can be used: {'; '.join(problems)}")
    folder.cut_metrics(0)
    return StoredUpdates(folder.updates), {"best_score": None, "best_round": 0, "metrics_length": 0}


def _config(
    config: str | Path | Mapping[str, Any] | Config | None, overrides: Mapping[str, Any] | None
) -> Config:
    if config is None:
        raise ConfigError("say what to run: a TOML file or a recipe, or resume=DIR")
    if not isinstance(config, Config):
        return read(config, overrides)
    if overrides:
        raise ConfigError(
            "overrides go with a file, a recipe or a table, not with a Config that was read before"
        )
    return config


def _resumed_config(
    config: str | Path | Mapping[str, Any] | Config | None,
    overrides: Mapping[str, Any] | None,
    folder: Path,
) -> Config:
    """The configuration of the run in ``folder``, or the given one if it has the same mathematics."""
    try:
        RunFolder.open(folder)
    except FileNotFoundError as error:
        raise ConfigError(f"--resume: {error}") from None
    stored = read(folder / "config.toml")
    wanted = read(folder / "config.toml", overrides) if config is None else _config(config, overrides)
    key = wanted.difference(stored)
    if key is not None:
        raise ConfigError(
            f"--resume {folder}: {key} differs from the run's own configuration ({folder / 'config.toml'}), "
            "and would change its results: leave it as it was, or begin a new run"
        )
    return wanted


def _new_folder(config: Config, out: str | Path | None, planned: Plan) -> RunFolder:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        folder = RunFolder.create(Path(out or Path("runs") / f"{config.name}-{stamp}"))
    except FileExistsError as error:
        raise ConfigError(str(error)) from None
    folder.write_json("partition.json", planned.partition_table())
    folder.write_json("environment.json", {**environment(), "experiment": uuid.uuid4().hex})
    # Last: a folder with a configuration is a run that can be resumed.
    folder.write_config(config.to_toml())
    return folder


def _say_what_is_run(
    watcher: ConsoleWatcher, planned: Plan, simulation: Simulation, folder: RunFolder
) -> None:
    server = simulation.server
    folder.write_head(server.head)
    watcher.say(
        f"{planned.config.name}: {planned.config.method.name}, {len(simulation.clients)} clients, "
        f"{server.rounds} rounds, {len(server.layers)} adapted layers; in {folder.path}"
    )
    watcher.layers(server.layers, planned.head, planned.head_is_trained_whole)


@contextmanager
def _stopping(watcher: ConsoleWatcher) -> Iterator[Any]:
    """Whether Ctrl-C was pressed. Once: the run ends after the client in hand. Twice: at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        watcher.note("stopping after the client in hand; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _remove_parts(folder: Path) -> None:
    """Remove what a killed process left half written."""
    for part in folder.rglob(".*.part"):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


def _quiet_libraries() -> None:
    """Keep transformers' reports on missing heads, which are expected here, out of the user's face."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
