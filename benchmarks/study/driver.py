"""Tune and compare the variants of a setting, one after another; recorded runs are never run again."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from rich.console import Console

from benchmarks.study.findings import best_trial, exploded
from benchmarks.study.records import RESULTS, Record, Records, by_round
from benchmarks.study.setting import Setting
from fedsmoothlora.config import Config, read
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments import compare, tuning
from fedsmoothlora.experiments.display import Display
from fedsmoothlora.experiments.execution import carry_out_all, side_by_side
from fedsmoothlora.experiments.forecast import forecast
from fedsmoothlora.experiments.planned_runs import PlannedRun
from fedsmoothlora.experiments.variants import Variant
from fedsmoothlora.reports.reading import read_metrics

# Added to the seed of trials that are scored on the test set.
_TUNING_SEEDS = 100

Key = TypeVar("Key", bound=tuple[Any, ...])


class BusyError(RuntimeError):
    """Another command works on the same scenario."""


class Study:
    """One scenario of a setting.

    Args:
        setting: the setting.
        scenario: its name.
        work: the folder of unfinished runs; a finished run is recorded and removed.
        results: the folder of the records.
        jobs: the number of runs at a time.
        only: labels to run now; all by default.
        here: values by dotted key that belong to this machine, such as ``data.path``.
        console: where progress is printed.
    """

    def __init__(
        self,
        setting: Setting,
        scenario: str,
        *,
        work: Path,
        results: Path = RESULTS,
        jobs: int = 1,
        only: Sequence[str] = (),
        here: Mapping[str, Any] = MappingProxyType({}),
        console: Console | None = None,
    ) -> None:
        self.setting, self.scenario, self.jobs = setting, scenario, jobs
        self.here = here
        self.overrides = {**setting.overrides(scenario), **here}
        self.work = work / setting.name / scenario
        self.records = Records(results / setting.name / scenario)
        self.console = console or Console()
        self.variants = [one for one in setting.variants_of(scenario) if not only or one.label in only]
        self.tuning_seeds = setting.tuning_seeds.get(scenario, 1)
        # Drawn for all variants of the setting, so that the choice does not depend on the scenario.
        self.trials = setting.trials_of(scenario)

    def run(self) -> list[str]:
        """Carry out all runs that are left.

        Returns the reasons of runs that failed or were interrupted, which are tried again next time, and the
        variants that cannot be compared because none of their trials finished.

        Raises:
            BusyError: another command works on this scenario.
            ConfigError: the records belong to other settings.
        """
        failed: list[str] = []
        with _alone(self.records.folder):
            self.records.belong_to(self.setting.in_common(self.scenario))
            for variant in self.variants:
                failed += self._run_all(self.trials_left(variant), self._trial_record, self.records.add_trial)
                chosen = self.chosen(variant)
                if chosen is not None:
                    failed += self._run_all(self.runs_left(chosen), self._run_record, self.records.add_run)
                elif self._is_tuned(variant):
                    failed.append(f"{variant.label}: no trial finished; give it another label and grid")
        return failed

    def run_again(self, wanted: Collection[tuple[str, int]]) -> list[str]:
        """Carry out some of the runs that are left, by label and seed; returns the reasons of failed ones."""
        failed: list[str] = []
        with _alone(self.records.folder):
            for chosen in map(self.chosen, self.variants):
                if chosen is not None:
                    left = {key: one for key, one in self.runs_left(chosen).items() if key in wanted}
                    failed += self._run_all(left, self._run_record, self.records.add_run)
        return failed

    def dry_run(self) -> float:
        """The seconds of all runs that are left, from a few measured batches of each variant."""
        wanted: dict[str, tuple[Config, int]] = {}
        for variant in self.variants:
            trials = sum(label == variant.label for label, _, _ in self.records.trials())
            runs = sum(label == variant.label for label, _ in self.records.runs())
            left = self._all_trials(variant) + len(self.setting.seeds) - trials - runs
            none_finished = self._is_tuned(variant) and self.chosen(variant) is None
            if left and not none_finished:
                prepared = self.trials_left(variant, every=True)
                wanted[variant.label] = next(iter(prepared.values())).config, left
        if not wanted:
            self.console.print("nothing is left")
            return 0.0
        found = forecast(wanted, self.jobs, self.console)
        return sum(one.runs * one.seconds for one in found.values()) / self.jobs

    def trials_left(self, variant: Variant, *, every: bool = False) -> dict[tuple[str, int, int], PlannedRun]:
        """Trials by label, number and seed that are not recorded; with ``every``, all trials.

        Raises ``ConfigError`` if a trial was recorded with other settings, or its options were not kept.
        """
        tried = self.trials[variant.label]
        known = self.records.trials()
        for (label, number, _), record in known.items():
            wanted = {**variant.overrides, **tried[number - 1]} if number <= len(tried) else None
            if label == variant.label and record["settings"] != wanted:
                raise ConfigError(
                    f"{self.records.folder}: trial {number} of {label} was recorded with "
                    f"{record['settings']}; the grid of recorded trials cannot change: choose another label"
                )
        if not every and self._is_tuned(variant):
            return {}
        self._refuse_what_was_dropped()
        if self.setting.tunes_on_test:
            return {
                key: planned_run
                for key, planned_run in self._trials_on_test(variant).items()
                if every or key not in known
            }
        prepared = tuning.prepare(
            self.setting.config,
            [variant],
            {variant.label: tried},
            self.overrides,
            out=self.work / "tuned",
            seeds=self.tuning_seeds,
            jobs=self.jobs,
            begin=False,
        )
        by_key = {
            (variant.label, int(name.rpartition("-")[2]), seed): planned_run
            for (name, seed), planned_run in prepared.planned_runs.items()
        }
        return {key: planned_run for key, planned_run in by_key.items() if every or key not in known}

    def _trials_on_test(self, variant: Variant) -> dict[tuple[str, int, int], PlannedRun]:
        """All trials of a variant by label, number and seed, whose scores are those on the test set."""
        planned_runs = {}
        for number, trial in enumerate(self.trials[variant.label], start=1):
            config = read(self.setting.config, {**self.overrides, **variant.overrides, **trial})
            config = replace(config, machine=side_by_side(config.machine, self.jobs))
            for seed in range(config.seed + _TUNING_SEEDS, config.seed + _TUNING_SEEDS + self.tuning_seeds):
                name = f"{variant.label}, trial {number}, seed {seed}"
                planned_runs[variant.label, number, seed] = PlannedRun(
                    name,
                    replace(config, seed=seed, name=f"{config.name}: {name}"),
                    self.work / "tuned" / "runs" / f"{variant.label}-{number:02d}" / f"seed-{seed}",
                )
        return planned_runs

    def chosen(self, variant: Variant) -> Variant | None:
        """The variant with its best settings; None if trials are left or none has a score."""
        trials = [one for (label, _, _), one in self.records.trials().items() if label == variant.label]
        best = best_trial(trials, self.setting.metric)
        if not self._is_tuned(variant) or best is None:
            return None
        return Variant(variant.label, best)

    def _is_tuned(self, variant: Variant) -> bool:
        """Whether all trials of a variant are recorded."""
        done = sum(label == variant.label for label, _, _ in self.records.trials())
        return done == self._all_trials(variant)

    def runs_left(self, chosen: Variant) -> dict[tuple[str, int], PlannedRun]:
        """Runs by label and seed that are not recorded.

        Raises ``ConfigError`` if a run was recorded with other settings than the chosen ones, or its
        options were not kept.
        """
        known = self.records.runs()
        for (label, seed), record in known.items():
            if label == chosen.label and record["settings"] != chosen.overrides:
                raise ConfigError(
                    f"{self.records.folder}: seed {seed} of {label} was run with {record['settings']}, and "
                    f"{dict(chosen.overrides)} is chosen: the trials were changed after it"
                )
        if all((chosen.label, seed) in known for seed in self.setting.seeds):
            return {}
        self._refuse_what_was_dropped()
        prepared = compare.prepare(
            self.setting.config,
            [chosen],
            self.overrides,
            out=self.work / "compared",
            seeds=len(self.setting.seeds),
            jobs=self.jobs,
            begin=False,
        )
        return {key: planned_run for key, planned_run in prepared.planned_runs.items() if key not in known}

    def _refuse_what_was_dropped(self) -> None:
        if commit := self.setting.dropped_after:
            raise ConfigError(
                f"{self.setting.name}: its variants need options that were not kept; for the runs that are "
                f"left, `git checkout {commit}` first"
            )

    def _all_trials(self, variant: Variant) -> int:
        return len(self.trials[variant.label]) * self.tuning_seeds

    def _run_all(
        self,
        planned_runs: Mapping[Key, PlannedRun],
        record: Callable[[Key, PlannedRun], Record],
        keep: Callable[[Record], None],
    ) -> list[str]:
        """Carry out as many runs at a time as there are jobs, and record them before the next ones start."""
        failed = []
        for some in _chunks(list(planned_runs.items()), self.jobs):
            with Display(self.console) as display:
                carry_out_all([planned_run for _, planned_run in some], self.jobs, display)
            for key, planned_run in some:
                if planned_run.state == "failed":
                    failed.append(f"{planned_run.name}: {planned_run.outcome()['reason']}")
                    continue
                if planned_run.state == "waiting":  # its process was stopped
                    failed.append(f"{planned_run.name}: interrupted; the same command continues it")
                    continue
                keep(record(key, planned_run))
                shutil.rmtree(planned_run.folder, ignore_errors=True)
                planned_run.outcome_file.unlink(missing_ok=True)
        return failed

    def _trial_record(self, key: tuple[str, int, int], planned_run: PlannedRun) -> Record:
        label, number, seed = key
        rounds = by_round(read_metrics(planned_run.folder), self.setting.metric)
        series = rounds.get(self.setting.metric, [])
        state = planned_run.state
        if exploded({"state": state, "rounds": rounds}):
            state = "exploded"  # `fedsmoothlora tune` does not choose such a trial either
        own = next(one.overrides for one in self.variants if one.label == label)
        return {
            "variant": label,
            "trial": number,
            "seed": seed,
            "settings": {**own, **self.trials[label][number - 1]},
            "state": state,
            "score": series[-1] if state == "finished" and series else None,
        }

    def _run_record(self, key: tuple[str, int], planned_run: PlannedRun) -> Record:
        chosen = next(self.chosen(one) for one in self.variants if one.label == key[0])
        assert chosen is not None
        return {
            "variant": key[0],
            "seed": key[1],
            "settings": dict(chosen.overrides),
            "state": planned_run.state,
            "rounds": by_round(read_metrics(planned_run.folder), self.setting.metric),
        }


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock the records of a scenario, so that two commands do not run the same trials.

    The second one gets a ``BusyError``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"{folder}: another command works on it") from None
        yield
