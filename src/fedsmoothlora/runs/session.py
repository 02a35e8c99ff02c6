"""A whole run: from a configuration to a folder with its metrics, pictures and model."""

from __future__ import annotations

import gc
import shutil
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from fedsmoothlora.callbacks import Callback, Callbacks, EarlyStopping, ProgressLoss, RunInfo
from fedsmoothlora.config import Config, ConfigError, first_difference, read, read_run_config, to_toml
from fedsmoothlora.config.settings import CheckpointSettings, TrackingSettings
from fedsmoothlora.errors import ClientProcessError, FederationStoppedError, InterruptedRunError
from fedsmoothlora.exports.base import task_of
from fedsmoothlora.exports.export import write_export
from fedsmoothlora.exports.run_model import RunModel
from fedsmoothlora.exports.trained import global_model
from fedsmoothlora.federation.assembly import RunContext
from fedsmoothlora.federation.round_metrics import measured_at_end
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.logs import run_logging
from fedsmoothlora.reports.report import write_report
from fedsmoothlora.reports.terminal import result
from fedsmoothlora.runs.console import ConsoleCallback
from fedsmoothlora.runs.environment import environment
from fedsmoothlora.runs.planning import Plan, build, plan
from fedsmoothlora.runs.result import Result
from fedsmoothlora.runs.trackers import check_extras, trackers
from fedsmoothlora.storage.checkpoints import Checkpoints, StoredUpdates
from fedsmoothlora.storage.client_store import StoredStates
from fedsmoothlora.storage.restoring import restore_server
from fedsmoothlora.storage.run_folder import RunFolder


def run(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    console: Console | None = None,
    verbosity: int = 0,
    callbacks: Sequence[Callback] = (),
    outputs: bool = True,
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
        verbosity: 1 shows the package's debug messages on standard error, -1 nothing but errors.
        callbacks: notified of every step of the run.
        outputs: write pictures, report and final model at the end; resuming a finished run writes them later.

    Returns:
        The folder and its metrics.

    Raises:
        ConfigError: a value cannot be right, ``out`` is in use, or a resumed run's mathematics would change.
            Nothing was trained.
        PackageError: a package that ships the model or the data cannot be had.
        StateError: no checkpoint of a resumed run can be used.
        FederationStoppedError: too few uploads could be used in a round.
        ClientProcessError: with ``machine.jobs`` above 1, a client's process failed or died.
        InterruptedRunError: Ctrl-C; the folder can be resumed.
    """
    config = resolved(config, overrides, resume)
    torch.set_num_threads(config.machine.threads)
    planned = plan(config)
    return carry_out(
        run_spec(planned),
        lambda context: build(planned, context),
        out=resume or out,
        resume=resume is not None,
        console=console,
        verbosity=verbosity,
        callbacks=callbacks,
        outputs=outputs,
    )


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A run before it has a folder.

    Attributes:
        settings: ``config.toml``: a dataclass of sections.
        name: the run's, for its folder and its first line.
        checkpoint: which checkpoints are kept.
        tracking: trackers of metrics beside ``metrics.jsonl``.
        tables: further JSON files of a new folder, by name.
        notes: sentences that the user should read before training.
        save_model: writes the final model into the run's folder; None where there is none to write.
        how_to_resume: the command or call that resumes the run, with ``{folder}`` to be filled in.
    """

    settings: Any
    name: str
    checkpoint: CheckpointSettings
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    save_model: Callable[[Simulation, RunFolder], None] | None = None
    how_to_resume: str = "fedsmoothlora run --resume {folder}"


def run_spec(planned: Plan, *, partition: Mapping[str, Any] | None = None) -> RunSpec:
    """The run of a plan.

    Args:
        planned: the plan.
        partition: the content of ``partition.json``; the plan's own unless given.
    """
    config = planned.config
    no_model = config.task.why_not_saved
    return RunSpec(
        settings=config,
        name=config.name,
        checkpoint=config.checkpoint,
        tracking=config.tracking,
        tables={"partition.json": planned.partition_table() if partition is None else partition},
        notes=[*planned.notes, *([no_model] if no_model else [])],
        save_model=None if no_model else lambda simulation, folder: _save_model(simulation, planned, folder),
    )


def carry_out(
    spec: RunSpec,
    build: Callable[[RunContext], Simulation],
    *,
    out: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
    verbosity: int = 0,
    callbacks: Sequence[Callback] = (),
    outputs: bool = True,
) -> Result:
    """Run a federation in a folder of its own, with a checkpoint after every round.

    Args:
        spec: the run.
        build: builds the federation, ready for round 0.
        out: the folder; ``runs/NAME-TIME`` unless given.
        resume: go on with the run in ``out``.
        console, verbosity, callbacks, outputs: as `run`.

    Raises:
        ConfigError: ``out`` is in use, or the run in it has other settings.
        TrackingError: a tracker is not available.
        StateError, FederationStoppedError, ClientProcessError, InterruptedRunError: as `run`.
    """
    console = console or Console(quiet=verbosity < 0)
    check_extras(spec.tracking)
    folder = _existing_folder(spec.settings, out) if resume else _new_folder(spec, out)
    with _session(
        spec, folder, [ConsoleCallback(console), *_early_stopping(spec), *callbacks], verbosity
    ) as session:
        simulation = build(session.context)
        session.train(simulation)
        if not outputs:
            return Result(folder=folder.path, metrics=folder.metrics(), stopped=folder.stopped)
        session.save_model(simulation)
        del simulation  # training's model is not needed beside what draws the report
        gc.collect()  # its modules and hooks refer to each other
        report = write_report(folder.path)
    for shown in result(folder.path):
        console.print(shown, highlight=False)
    pictures = [folder.path / f"{name}.png" for name in ("accuracy", "loss")]
    for picture in [path for path in pictures if path.exists()][:1]:
        console.print(f"plots:  {picture}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {report}", highlight=False, markup=False, soft_wrap=True)
    if folder.model.exists():
        console.print(f"model:  {folder.model}", highlight=False, markup=False, soft_wrap=True)
    return Result(folder=folder.path, metrics=folder.metrics(), stopped=folder.stopped)


@dataclass(frozen=True, kw_only=True)
class Session:
    """A run in progress.

    Attributes:
        spec: the run.
        folder: its folder.
        callbacks: consoles, trackers and callbacks of the user's own.
        should_stop: whether Ctrl-C was pressed.
    """

    spec: RunSpec
    folder: RunFolder
    callbacks: Callback
    should_stop: Callable[[], bool]

    @property
    def context(self) -> RunContext:
        """The parts of the federation that belong to this run."""
        experiment = self.folder.read_json("environment.json")["experiment"]
        return RunContext(
            experiment=experiment,
            states=StoredStates(self.folder.clients, experiment),
            updates=StoredUpdates(self.folder.updates),
            should_stop=self.should_stop,
        )

    def train(self, simulation: Simulation) -> None:
        """Run the rounds that are left, with a checkpoint after each."""
        server = simulation.server
        checkpoints = Checkpoints(self.folder.checkpoints, self.spec.checkpoint)
        progress, notes = self._restore(simulation, checkpoints)
        self.callbacks.on_run_begin(
            RunInfo(
                name=self.spec.name,
                folder=self.folder.path,
                method=server.method.name,
                rounds=server.rounds,
                clients=len(simulation.clients),
                layers=server.layers,
                head=list(server.head),
                history=self.folder.records(),
            )
        )
        for note in [*self.spec.notes, *notes]:
            self.callbacks.on_note(note)
        try:
            self._train(simulation, checkpoints, progress)
        except (InterruptedRunError, FederationStoppedError, ClientProcessError):
            self.callbacks.on_note(f"to go on: {self.spec.how_to_resume.format(folder=self.folder.path)}")
            raise

    def _train(self, simulation: Simulation, checkpoints: Checkpoints, progress: dict[str, Any]) -> None:
        folder, server, settings = self.folder, simulation.server, self.spec.checkpoint
        folder.write_stopped(None)
        test = simulation.test
        folder.write_json("evaluation.json", {"test_rows": None if test is None else len(test)})
        sign = -1.0 if settings.best == "loss" else 1.0
        rounds = run_rounds(simulation, self.callbacks, resumed=progress["best_score"] is not None)
        while self._goes_on(simulation) and (record := next(rounds, None)) is not None:
            value = record.value(settings.best)
            score = -float("inf") if value is None else sign * value
            if progress["best_score"] is None or score > progress["best_score"]:
                progress |= {"best_score": score, "best_round": record.round}
            progress["metrics_length"] = folder.append_metrics(record)
            folder.write_confusion(record)
            # Before the checkpoint: a round that is run again takes its own place in a tracker.
            self.callbacks.on_round_end(record)
            assert isinstance(server.updates, StoredUpdates)
            checkpoints.save(server, server.updates, progress)

    def _goes_on(self, simulation: Simulation) -> bool:
        """Whether no callback ends the run before the next round. Where one does, its reason is recorded."""
        server, reason = simulation.server, self.callbacks.stop_reason
        if reason is None or server.round == server.rounds:
            return True
        self.folder.write_stopped(reason)
        record = measured_at_end(simulation)
        if record.metrics:
            self.folder.append_metrics(record)
        self.callbacks.on_note(f"the run ends after round {server.round} of {server.rounds}: {reason}")
        return False

    def _restore(
        self, simulation: Simulation, checkpoints: Checkpoints
    ) -> tuple[dict[str, Any], Sequence[str]]:
        """Restore the newest complete checkpoint, if there is one; the progress of the run, and notes."""
        folder, server = self.folder, simulation.server
        folder.write_head(server.head)
        _remove_parts(folder.path)
        notes: list[str] = []
        checkpoint = restore_server(server, folder, checkpoints, notes.append)
        if checkpoint is None:
            folder.cut_metrics(0)
            return {"best_score": None, "best_round": 0, "metrics_length": 0}, notes
        for update in server.updates:
            simulation.learner.model.backbone.merge(update)
        progress = dict(checkpoint.table["progress"])
        folder.cut_metrics(progress["metrics_length"])
        return progress, [*notes, f"resumed after round {checkpoint.round} of {server.rounds}"]

    def save_model(self, simulation: Simulation) -> None:
        """Write the final model, unless it is there already or the method has no global model."""
        method = simulation.learner.method
        if not method.traits.global_model:
            self.callbacks.on_note(f"{method.name} has no global model: none is written")
        elif self.spec.save_model is not None and not self.folder.model.exists():
            self.spec.save_model(simulation, self.folder)


def _early_stopping(spec: RunSpec) -> list[Callback]:
    """The callback of ``training.patience``, if it is set."""
    patience, metric = spec.settings.training.patience, spec.checkpoint.best
    return [EarlyStopping(metric, patience, larger_is_better=metric != "loss")] if patience else []


@contextmanager
def _session(
    spec: RunSpec, folder: RunFolder, callbacks: Sequence[Callback], verbosity: int
) -> Iterator[Session]:
    """A session whose log, trackers and signal handler are closed when the block ends."""
    with run_logging(folder.path, verbosity):
        found = trackers(spec.tracking, folder.path, to_toml(spec.settings), spec.name)
        # Trackers first: a callback that raises must not cost them a round.
        metric = spec.checkpoint.best
        fall = ProgressLoss(metric, lambda text: notified.on_note(text), larger_is_better=metric != "loss")
        notified = Callbacks([*found, *callbacks, fall])
        try:
            with _stopping(notified) as should_stop:
                yield Session(spec=spec, folder=folder, callbacks=notified, should_stop=should_stop)
        finally:
            notified.on_run_end()


def _save_model(simulation: Simulation, planned: Plan, folder: RunFolder) -> None:
    """Write the final model as a plain transformers folder: every update merged, no adapter."""
    outcome = RunModel(
        config=planned.config,
        task=task_of(simulation.learner.model.model),
        server=simulation.server,
        partition=planned.partition_table(),
        metrics=folder.metrics(),
    )
    write_export(outcome, global_model(simulation.server), "merged", folder.model)


def resolved(
    config: str | Path | Mapping[str, Any] | Config | None,
    overrides: Mapping[str, Any] | None,
    resume: str | Path | None,
) -> Config:
    """The configuration to run, or that of the run to go on with. Raises ``ConfigError``."""
    if resume is not None:
        return _resumed_config(config, overrides, Path(resume))
    return _config(config, overrides)


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
    """The given configuration, or that of the run in ``folder``."""
    if config is not None:
        return _config(config, overrides)
    return read_run_config(_opened(folder).path / "config.toml", overrides)


def _existing_folder(settings: Any, out: str | Path | None) -> RunFolder:
    """The folder of a run with the same mathematics."""
    if out is None:
        raise ConfigError("say which run to go on with: out=DIR")
    folder = _opened(Path(out))
    file = folder.path / "config.toml"
    key = first_difference(to_toml(settings), file.read_text(encoding="utf-8"))
    if key is not None:
        raise ConfigError(
            f"--resume {folder.path}: {key} differs from the run's own configuration ({file}), and would "
            "change its results: leave it as it was, or begin a new run"
        )
    return folder


def _opened(folder: Path) -> RunFolder:
    try:
        return RunFolder.open(folder)
    except FileNotFoundError as error:
        raise ConfigError(f"--resume: {error}") from None


def _new_folder(spec: RunSpec, out: str | Path | None) -> RunFolder:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        folder = RunFolder.create(Path(out or Path("runs") / f"{spec.name}-{stamp}"))
    except FileExistsError as error:
        raise ConfigError(str(error)) from None
    for file, table in spec.tables.items():
        folder.write_json(file, table)
    folder.write_json("environment.json", {**environment(), "experiment": uuid.uuid4().hex})
    # Last: a folder with a configuration is a run that can be resumed.
    folder.write_config(to_toml(spec.settings))
    return folder


@contextmanager
def _stopping(callback: Callback) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed. Once: the run ends after the clients in hand. Twice: at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        callback.on_note("stopping after the clients in hand; press Ctrl-C again to stop at once")

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
