"""Carry out a run: from a configuration to a folder with its metrics, pictures and model."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedsmoothlora.callbacks import Callback, Callbacks, EarlyStopping, ProgressLoss, RunInfo
from fedsmoothlora.config import Config, Sections, to_toml
from fedsmoothlora.config.settings import CheckpointSettings, TrackingSettings
from fedsmoothlora.errors import (
    ClientProcessError,
    FederationStoppedError,
    InterruptedRunError,
    StateError,
    StorageError,
)
from fedsmoothlora.exports.base import task_of
from fedsmoothlora.exports.export import write_export
from fedsmoothlora.exports.run_model import RunModel
from fedsmoothlora.exports.trained import global_model
from fedsmoothlora.federation.assembly import RunContext
from fedsmoothlora.federation.devices import computing
from fedsmoothlora.federation.fairness import fairness
from fedsmoothlora.federation.masked import check_engine
from fedsmoothlora.federation.records import RoundRecord
from fedsmoothlora.federation.round_metrics import measured_at_end, personal_at_end
from fedsmoothlora.federation.rounds import run_rounds
from fedsmoothlora.federation.simulation import NoReplies, Simulation
from fedsmoothlora.logs import run_logging
from fedsmoothlora.reports.metrics import HIGHLIGHTS, larger_is_better, main_metrics
from fedsmoothlora.reports.report import write_report
from fedsmoothlora.reports.terminal import result
from fedsmoothlora.runs.console import ConsoleCallback
from fedsmoothlora.runs.folders import check_outputs, existing_folder, new_folder, resolved
from fedsmoothlora.runs.health import Health, loss_far_above_the_first
from fedsmoothlora.runs.notes import FoldedNotes
from fedsmoothlora.runs.planning import Plan, build, plan
from fedsmoothlora.runs.privacy_lines import forecast
from fedsmoothlora.runs.progress_file import ProgressFile
from fedsmoothlora.runs.progress_lines import ProgressLines
from fedsmoothlora.runs.result import Result
from fedsmoothlora.runs.stopping import stopping
from fedsmoothlora.runs.trackers import check_extras, trackers
from fedsmoothlora.storage.arrivals import StoredArrivals, replayed
from fedsmoothlora.storage.checkpoints import Checkpoints, StoredUpdates
from fedsmoothlora.storage.client_store import StoredStates
from fedsmoothlora.storage.files import remove_parts, storage_errors
from fedsmoothlora.storage.inputs import MODEL, Entry, base_model, check_inputs, recorded_inputs
from fedsmoothlora.storage.privacy_ledger import StoredLedger
from fedsmoothlora.storage.replies import StoredReplies
from fedsmoothlora.storage.restoring import restore_server
from fedsmoothlora.storage.run_folder import RunFolder
from fedsmoothlora.storage.sums import StoredSums

# Errors after which a run can be resumed as it is.
_RESUMABLE = (
    InterruptedRunError,
    KeyboardInterrupt,
    FederationStoppedError,
    ClientProcessError,
    StorageError,
)


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
        overrides: values that replace those of the configuration, by dotted key: ``{"training.rounds": 3}``.
        out: the run's folder, new or empty; ``runs/NAME-TIME`` unless given.
        resume: the folder of a run to resume, instead of ``out``. ``config`` may be omitted; if given, it
            must not change the results.
        console: where progress is shown; standard output unless given.
        verbosity: 1 also shows the package's debug messages on standard error, -1 only errors.
        callbacks: notified of every step of the run.
        outputs: write pictures, report and final model at the end. Resuming a finished run writes them later.

    Returns:
        The folder and its metrics.

    Raises:
        ConfigError: a value is not valid, ``out`` is in use, or the results of a resumed run would change.
            Nothing was trained.
        PackageError: a package that contains the model or the data cannot be fetched or read.
        StateError: no checkpoint of a resumed run can be used, or its data, base weights or configuration
            have changed since it began.
        StorageError: a file cannot be written; the folder can be resumed.
        FederationStoppedError: too few uploads could be used in a round.
        ClientProcessError: with ``machine.jobs`` above 1, a client's process failed or died.
        InterruptedRunError: Ctrl-C or SIGTERM; the folder can be resumed.
    """
    config = resolved(config, overrides, resume)
    check_engine(config.privacy.secure_aggregation)
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
        settings: the content of ``config.toml``.
        name: the name of the run, for its folder and its first line.
        checkpoint: ``[checkpoint]``.
        tracking: ``[tracking]``.
        tables: further JSON files of a new folder, by name.
        inputs: hashes of the data files and the base weights, see `fedsmoothlora.storage.inputs`.
        notes: sentences for the user to read before training.
        save_model: writes the final model into the run's folder, given the lines of ``metrics.jsonl``; None
            if there is no model to write.
        how_to_resume: the command or call that resumes the run, with ``{folder}`` to be filled in.
    """

    settings: Sections
    name: str
    checkpoint: CheckpointSettings
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inputs: Mapping[str, Entry] = field(default_factory=dict)
    notes: Sequence[str] = ()
    save_model: Callable[[Simulation, RunFolder, Sequence[Mapping[str, Any]]], None] | None = None
    how_to_resume: str = "fedsmoothlora run --resume {folder}"


def run_spec(planned: Plan, *, partition: Mapping[str, Any] | None = None) -> RunSpec:
    """The run of a plan. Data files and base weights are hashed, which reads them once.

    Args:
        planned: the plan.
        partition: the content of ``partition.json``; the plan's own unless given.

    Raises ``StateError`` that names an input which cannot be read.
    """
    config, data = planned.config, planned.task_data.data
    no_model = config.task.why_not_saved
    return RunSpec(
        settings=config,
        name=config.name,
        checkpoint=config.checkpoint,
        tracking=config.tracking,
        tables={"partition.json": planned.partition_table() if partition is None else partition},
        inputs=recorded_inputs(config, [data.train, data.test]),
        notes=[
            *planned.notes,
            *forecast(config, planned.known_rows),
            *([no_model] if no_model else []),
        ],
        save_model=None
        if no_model
        else lambda simulation, folder, metrics: _save_model(simulation, planned, folder, metrics),
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
        resume: resume the run in ``out``.
        console, verbosity, callbacks, outputs: as in `run`.

    Raises:
        ConfigError: ``out`` is in use, or the run in it has other settings.
        TrackingError: a tracker is not available.
        StateError, StorageError, FederationStoppedError, ClientProcessError, InterruptedRunError: as `run`.
    """
    console = console or Console(quiet=verbosity < 0)
    check_extras(spec.tracking)
    if resume:
        folder = existing_folder(spec.settings, spec.inputs, out)
        if (partition := spec.tables.get("partition.json")) is not None:
            check_outputs(folder, partition)
    else:
        folder = new_folder(spec.settings, spec.name, spec.tables, spec.inputs, out)
    shown: list[Callback] = [ConsoleCallback(console)]
    if not console.is_terminal:
        shown.append(ProgressLines(console))
    callbacks = [*shown, *_early_stopping(spec), *callbacks]
    with computing(spec.settings.machine), _session(spec, folder, callbacks, verbosity) as session:
        simulation = build(session.context)
        session.train(simulation)
        if not outputs:
            return Result(folder=folder.path, metrics=folder.metrics(), stopped=folder.stopped)
        session.save_model(simulation)
        del simulation  # free the memory of the trained model before the report is drawn
        gc.collect()  # its modules and hooks refer to each other
        with storage_errors(folder.path / "report.html"):
            report = write_report(folder.path)
    for shown_result in result(folder.path):
        console.print(shown_result, highlight=False)
    pictures = [folder.path / f"{name}.png" for name in (*HIGHLIGHTS, "loss")]
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
        callbacks: the console, trackers and the user's own callbacks.
        should_stop: whether Ctrl-C or SIGTERM asked the run to stop.
    """

    spec: RunSpec
    folder: RunFolder
    callbacks: Callback
    should_stop: Callable[[], bool]

    @property
    def context(self) -> RunContext:
        """The parts of the federation that belong to this run."""
        experiment = self.folder.experiment
        return RunContext(
            experiment=experiment,
            states=StoredStates(self.folder.clients, experiment),
            replies=NoReplies() if self._batches_clients else self.replies,
            sums=StoredSums(self.folder.sums, experiment),
            arrivals=StoredArrivals(self.folder.arrivals),
            replayed=replayed(self.spec.settings.participation),
            updates=StoredUpdates(self.folder.updates),
            ledger=StoredLedger(self.folder.privacy),
            should_stop=self.should_stop,
        )

    @property
    def _batches_clients(self) -> bool:
        """Whether clients train together. An interrupted round is then repeated, with the same groups."""
        return self.spec.settings.machine.batch_clients > 1

    @property
    def replies(self) -> StoredReplies:
        """The replies of the round in progress."""
        return StoredReplies(self.folder.replies, self.folder.experiment)

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
                history=self._history(notes),
            )
        )
        for note in [*self.spec.notes, *notes]:
            self.callbacks.on_note(note)
        self._train(simulation, checkpoints, progress)
        if note := loss_far_above_the_first(self._history([])):
            self.callbacks.on_note(note)

    def _train(self, simulation: Simulation, checkpoints: Checkpoints, progress: dict[str, Any]) -> None:
        folder, server, settings = self.folder, simulation.server, self.spec.checkpoint
        folder.write_stopped(None)
        test = simulation.test
        folder.write_json("evaluation.json", {"test_rows": None if test is None else len(test)})
        replies = self.replies
        sign = 1.0 if larger_is_better(settings.best) else -1.0
        rounds = run_rounds(simulation, self.callbacks, resumed=progress["best_score"] is not None)
        while self._goes_on(simulation) and (record := next(rounds, None)) is not None:
            record = self._with_fairness(record)
            value = record.value(settings.best)
            if value is None and record.round == 0:
                self.callbacks.on_note(
                    f"checkpoint.best = {settings.best!r}: the run records no such metric, so no round is "
                    "the best"
                )
            # A value that is not a number would never be surpassed.
            score = -math.inf if value is None or math.isnan(value) else sign * value
            if progress["best_score"] is None or score > progress["best_score"]:
                progress |= {"best_score": score, "best_round": record.round}
            progress["metrics_length"] = folder.append_metrics(record)
            folder.write_confusion(record)
            # Before the checkpoint, so that trackers replace the values of a round that is run again.
            self.callbacks.on_round_end(record)
            assert isinstance(server.updates, StoredUpdates)
            checkpoints.save(server, server.updates, progress)
            replies.clear(checkpoints.in_flight() if simulation.participation.asynchronous else ())
        personal = self._with_fairness(personal_at_end(simulation, self.callbacks))
        if personal.metrics:
            folder.append_metrics(personal)

    def _with_fairness(self, record: RoundRecord) -> RoundRecord:
        """The record with the spread of the main metric over clients."""
        name = self.spec.checkpoint.best
        found = fairness(record.metrics, name, larger_is_better=larger_is_better(name))
        return replace(record, metrics=[*record.metrics, *found]) if found else record

    def _history(self, notes: list[str]) -> Sequence[RoundRecord]:
        """The records of earlier rounds. Damaged metrics are noted: they must not cost the final model."""
        try:
            return self.folder.records()
        except StateError as error:
            notes.append(f"the run continues without the metrics of its earlier rounds: {error}")
            return ()

    def _goes_on(self, simulation: Simulation) -> bool:
        """Whether no callback ends the run before the next round. Where one does, its reason is recorded."""
        server, reason = simulation.server, self.callbacks.stop_reason
        if server.private is not None:
            reason = reason or server.private.budget.stop_reason
        if reason is None or server.round == server.rounds:
            return True
        record = measured_at_end(simulation)
        if record.metrics:
            self.folder.append_metrics(record)
        self.folder.write_stopped(reason)  # last: a comparison does not continue a run that has it
        self.callbacks.on_note(f"the run ends after round {server.round} of {server.rounds}: {reason}")
        return False

    def _restore(self, simulation: Simulation, checkpoints: Checkpoints) -> tuple[dict[str, Any], list[str]]:
        """Restore the newest complete checkpoint, if there is one; the progress of the run, and notes."""
        folder, server = self.folder, simulation.server
        folder.write_head(server.head)
        remove_parts(folder.path)
        notes: list[str] = []
        checkpoint = restore_server(server, folder, checkpoints, notes.append)
        if server.private is not None:
            StoredLedger(folder.privacy).check(server.round)
        if checkpoint is None:
            folder.check_not_reduced()
            folder.cut_metrics(0)
            return {"best_score": None, "best_round": 0, "metrics_length": 0}, notes
        for update in server.updates:
            simulation.learner.model.backbone.merge(update)
        progress = dict(checkpoint.table["progress"])
        folder.cut_metrics(progress["metrics_length"])
        return progress, [*notes, f"resumed after round {checkpoint.round} of {server.rounds}"]

    def save_model(self, simulation: Simulation) -> None:
        """Write the final model, unless it exists already or the method has no global model."""
        method = simulation.learner.method
        if not method.traits.global_model:
            self.callbacks.on_note(f"{method.name} has no global model: none is written")
        elif self.spec.save_model is not None and not self.folder.model.exists():
            try:
                metrics = self.folder.metrics()
            except StateError as error:
                self.callbacks.on_note(f"the model's card has no metrics: {error}")
                metrics = []
            self.spec.save_model(simulation, self.folder, metrics)


def _early_stopping(spec: RunSpec) -> list[Callback]:
    """The callback of ``training.patience``, if it is set."""
    patience, metric = spec.settings.training.patience, spec.checkpoint.best
    return [EarlyStopping(metric, patience, larger_is_better=larger_is_better(metric))] if patience else []


@contextmanager
def _session(
    spec: RunSpec, folder: RunFolder, callbacks: Sequence[Callback], verbosity: int
) -> Iterator[Session]:
    """A session whose log, trackers and signal handlers are closed when the block ends."""
    with ExitStack() as stack:
        with storage_errors(folder.path / "run.log"):
            stack.enter_context(run_logging(folder.path, verbosity))
        found = trackers(spec.tracking, folder.path, to_toml(spec.settings), spec.name)
        # Trackers first, so that they record a round in which a later callback raises.
        shown = FoldedNotes([*found, *callbacks])
        settings = spec.settings
        health = Health(settings.training, settings.method, shown.on_note)
        falls = [
            ProgressLoss(metric, shown.on_note, larger_is_better=larger_is_better(metric))
            for metric in main_metrics(spec.checkpoint.best)
        ]
        progress = ProgressFile(folder.progress, private=settings.privacy.on)
        notified = Callbacks([progress, shown, health, *falls])
        try:
            with stopping(notified) as should_stop:
                yield Session(spec=spec, folder=folder, callbacks=notified, should_stop=should_stop)
        except _RESUMABLE:
            notified.on_note(f"to go on: {spec.how_to_resume.format(folder=folder.path)}")
            raise
        finally:
            notified.on_run_end()


def _save_model(
    simulation: Simulation, planned: Plan, folder: RunFolder, metrics: Sequence[Mapping[str, Any]]
) -> None:
    """Write the final model as a plain transformers folder: every update merged, no adapter."""
    run_model = RunModel(
        config=planned.config,
        task=task_of(simulation.learner.model.model),
        server=simulation.server,
        partition=planned.partition_table(),
        metrics=metrics,
    )
    check_inputs(folder, {MODEL: base_model(planned.config)})  # it is read again
    write_export(run_model, global_model(simulation.server), "merged", folder.model)
