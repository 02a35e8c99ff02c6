"""Choosing settings for methods and variants: the same number of trials each, on rows and seeds of their own.

========================  ======================================================================
``tuning.toml``           what all trials have in common
``runs/LABEL/trial-01/seed-1000000/``  one run, an ordinary folder
``tuned.json``            everything that was tried, and what was chosen
``tuned.csv``             the same, one row a trial
``chosen.toml``           the best of every variant: `compare --methods DIR/chosen.toml` takes it
========================  ======================================================================
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsmoothlora.config import Config, read
from fedsmoothlora.errors import ConfigError, InterruptedRunError
from fedsmoothlora.experiments.compare import FIRST_TUNING_SEED
from fedsmoothlora.experiments.folder import remember
from fedsmoothlora.experiments.forecast import Forecast, forecast
from fedsmoothlora.experiments.grid import settings_to_try
from fedsmoothlora.experiments.planned_runs import PlannedRun, run_all, side_by_side
from fedsmoothlora.experiments.results import RunResult, read_results
from fedsmoothlora.experiments.tables import spreadsheet_cell
from fedsmoothlora.experiments.variants import Variant, collect, to_tables, to_toml
from fedsmoothlora.reports.metrics import larger_is_better
from fedsmoothlora.runs.planning import plan
from fedsmoothlora.storage.files import write_text

VALIDATION = 0.2
"""The share of each client's rows that trials are scored on, where the configuration keeps none."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One setting of a variant that was tried.

    Attributes:
        variant: its label, a method's name where it is that method as it stands.
        number: from 1.
        overrides: what it sets beside the variant's own settings.
        scores: the metric after the last round, by tuning seed; of runs that finished.
        states: how its runs ended, by tuning seed.
        reasons: why they did not finish, by tuning seed.
    """

    variant: str
    number: int
    overrides: Mapping[str, Any]
    scores: Mapping[int, float]
    states: Mapping[int, str]
    reasons: Mapping[int, str]

    @property
    def score(self) -> float | None:
        """The mean score; None if any run did not finish, which rules the trial out."""
        return fmean(self.scores.values()) if len(self.scores) == len(self.states) else None


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was tried and chosen.

    Attributes:
        folder: all of it.
        metric: what decided, on the clients' validation rows.
        trials: all, in order.
        chosen: the best trial by label; variants of which none finished are missing.
        at_edge: by label, the keys whose chosen value is the smallest or largest that was tried.
        failed: why runs failed, by their names.
    """

    folder: Path
    metric: str
    trials: Sequence[Trial]
    chosen: Mapping[str, Trial]
    at_edge: Mapping[str, Sequence[str]]
    failed: Mapping[str, str]


def tune(
    config: str | Path | Mapping[str, Any],
    methods: Sequence[str | Path | Variant],
    grid: Mapping[str, Sequence[Any]],
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path,
    trials: int | None = None,
    seeds: int = 1,
    jobs: int = 1,
    metric: str | None = None,
    console: Console | None = None,
) -> Tuned:
    """Try settings of every method or variant, the same number of each, and choose the best. Resumable.

    A trial trains on the clients' rows without a share kept for validation (``data.validation``, 0.2 where
    the configuration keeps none), and its score is the metric on those after the last round. The test set is
    not looked at, and the seeds are none of `compare`'s. What diverges counts as a trial.

    Args:
        config: a TOML file, a recipe's name, or a table.
        methods: what to tune, as of `compare`: methods by name, ``LABEL: METHOD KEY=VALUE ...``, files.
        grid: values by key. A key holds for all methods that have it; ``METHOD:KEY`` for one, in its place,
            ``LABEL:KEY`` for one variant. What a variant sets itself is not tried.
        overrides: values for all, by dotted key.
        out: the folder; one that was begun before is gone on with.
        trials: of each: its whole grid where that has so many points, else a subset drawn by seed.
            As many as the smallest grid has unless given.
        seeds: runs of every trial, whose mean is its score.
        jobs: runs at a time, as of `compare`.
        metric: ``accuracy``, or ``loss`` where there is none.
        console: where progress is shown; standard output unless given.

    Raises:
        ConfigError: something cannot be right, or a grid has fewer points than trials. Nothing was run.
        PackageError: a package that ships the model or the data cannot be had.
        InterruptedRunError: Ctrl-C; the same call goes on.
    """
    console = console or Console()
    variants = collect(methods)
    settings = settings_to_try(variants, grid, trials, read(config, overrides).seed)
    planned_runs = prepare(config, variants, settings, overrides, out=Path(out), seeds=seeds, jobs=jobs)
    try:
        run_all(list(planned_runs.values()), jobs, console)
    except InterruptedRunError as error:
        raise InterruptedRunError(f"{error}; the same command goes on with {out}") from None
    tuned = _read(settings, planned_runs, Path(out), metric)
    _write(tuned, variants, console)
    return tuned


def dry_run(
    config: str | Path | Mapping[str, Any],
    methods: Sequence[str | Path | Variant],
    grid: Mapping[str, Sequence[Any]],
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path,
    trials: int | None = None,
    seeds: int = 1,
    jobs: int = 1,
    console: Console | None = None,
) -> dict[str, Forecast]:
    """Measure a few batches of each method's first trial, and say how long `tune` will take."""
    variants = collect(methods)
    settings = settings_to_try(variants, grid, trials, read(config, overrides).seed)
    planned_runs = prepare(
        config, variants, settings, overrides, out=Path(out), seeds=seeds, jobs=jobs, begin=False
    )
    wanted: dict[str, tuple[Config, int]] = {}
    for (label, _), planned_run in planned_runs.items():
        planned_run.check()
        variant = label.partition("/")[0]
        first, left = wanted.get(variant, (planned_run.config, 0))
        wanted[variant] = first, left + (planned_run.state in ("waiting", "failed"))
    return forecast(wanted, jobs, console or Console())


def prepare(
    config: str | Path | Mapping[str, Any],
    variants: Sequence[Variant],
    settings: Mapping[str, Sequence[Mapping[str, Any]]],
    overrides: Mapping[str, Any] | None,
    *,
    out: Path,
    seeds: int,
    jobs: int,
    begin: bool = True,
) -> dict[tuple[str, int], PlannedRun]:
    """The runs by ``LABEL/trial-01`` and seed, checked; ``begin`` makes the folder."""
    if seeds < 1 or jobs < 1:
        raise ConfigError(f"--seeds {seeds} --jobs {jobs}: must be at least 1")
    shared = {**(overrides or {}), "evaluation.test": False}
    base = read(config, shared)
    if not base.data.validation:
        shared["data.validation"] = VALIDATION
        base = read(config, shared)
    if base.seed >= FIRST_TUNING_SEED:
        raise ConfigError(
            f"seed = {base.seed}: give that of the comparison; tuning adds {FIRST_TUNING_SEED:,}"
        )
    first = FIRST_TUNING_SEED + base.seed
    base = replace(base, machine=side_by_side(base.machine, jobs))
    configs: dict[str, Config] = {}
    for variant in variants:
        for number, trial in enumerate(settings[variant.label], start=1):
            try:
                one = read(config, {**shared, **variant.overrides, **trial})
                if number == 1:
                    plan(replace(one, seed=first))
            except ConfigError as error:
                raise ConfigError(f"{variant.label}, trial {number} {_in_words(trial)}: {error}") from None
            configs[f"{variant.label}/trial-{number:02d}"] = one
    if begin:
        tried = {
            variant: {
                f"trial-{number:02d}": {key.replace(".", "_"): value for key, value in trial.items()}
                for number, trial in enumerate(trials, start=1)
            }
            for variant, trials in settings.items()
        }
        own = {table.pop("label"): table for table in to_tables(variants)}
        base = remember(out / "tuning.toml", base, {"variant": own, "trial": tried})
    return {
        (label, seed): PlannedRun(
            f"{label}, seed {seed}",
            replace(one, seed=seed, name=f"{base.name}: {label}, seed {seed}", machine=base.machine),
            out / "runs" / label / f"seed-{seed}",
        )
        for label, one in configs.items()
        for seed in range(first, first + seeds)
    }


def _read(
    settings: Mapping[str, Sequence[Mapping[str, Any]]],
    planned_runs: Mapping[tuple[str, int], PlannedRun],
    out: Path,
    metric: str | None,
) -> Tuned:
    """Score every trial, and choose."""
    results = read_results(planned_runs, metric=metric, on_test=False)
    trials = [
        _trial(variant, number, overrides, results.of(f"{variant}/trial-{number:02d}"), results.metric)
        for variant, tried in settings.items()
        for number, overrides in enumerate(tried, start=1)
    ]
    sign = 1 if larger_is_better(results.metric) else -1
    chosen: dict[str, Trial] = {}
    for trial in trials:
        best = chosen.get(trial.variant)
        # The first of equals.
        if trial.score is not None and (best is None or sign * trial.score > sign * (best.score or 0.0)):
            chosen[trial.variant] = trial
    return Tuned(
        folder=out,
        metric=results.metric,
        trials=trials,
        chosen=chosen,
        at_edge={variant: _at_edge(trial, settings[variant]) for variant, trial in chosen.items()},
        failed={
            planned_run.name: planned_run.outcome()["reason"]
            for planned_run in planned_runs.values()
            if planned_run.state == "failed"
        },
    )


def _trial(
    variant: str, number: int, overrides: Mapping[str, Any], runs: Sequence[RunResult], metric: str
) -> Trial:
    finals = {run.seed: run.final(metric) for run in runs}
    return Trial(
        variant=variant,
        number=number,
        overrides=overrides,
        scores={seed: value for seed, value in finals.items() if value is not None},
        states={run.seed: run.state for run in runs},
        reasons={run.seed: run.reason for run in runs if run.reason},
    )


def _at_edge(chosen: Trial, tried: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose chosen number is the smallest or largest of several that were tried."""
    found = []
    for key, value in chosen.overrides.items():
        values = {trial[key] for trial in tried if isinstance(trial[key], int | float)}
        if len(values) > 1 and not isinstance(value, bool) and value in (min(values), max(values)):
            found.append(key)
    return found


def _write(tuned: Tuned, variants: Sequence[Variant], console: Console) -> None:
    """Write what was tried and chosen, and print it."""
    write_text(tuned.folder / "tuned.json", json.dumps(_as_json(tuned), indent=2) + "\n")
    write_text(tuned.folder / "tuned.csv", _as_csv(tuned))
    own = {variant.label: variant.overrides for variant in variants}
    best = [Variant(label, {**own[label], **trial.overrides}) for label, trial in tuned.chosen.items()]
    write_text(tuned.folder / "chosen.toml", to_toml(best))
    head = ("variant", "trial", "settings", f"validation {tuned.metric}", "")
    table = Table(*head, box=None, pad_edge=False)
    for trial in tuned.trials:
        is_best = tuned.chosen.get(trial.variant) is trial
        score = ", ".join(sorted(set(trial.states.values()))) if trial.score is None else f"{trial.score:.4f}"
        table.add_row(
            trial.variant, str(trial.number), _in_words(trial.overrides), score, "chosen" if is_best else ""
        )
    console.print(table)
    for variant, keys in tuned.at_edge.items():
        for key in keys:
            console.print(
                f"{variant}: the chosen {key} = {tuned.chosen[variant].overrides[key]} is at the edge of "
                "what was tried; values beyond it may be better",
                style="yellow",
                highlight=False,
                soft_wrap=True,
            )
    for variant in dict.fromkeys(trial.variant for trial in tuned.trials):
        if variant not in tuned.chosen:
            console.print(f"{variant}: no trial finished; nothing is chosen", style="red", highlight=False)
    for name, reason in tuned.failed.items():
        console.print(f"failed: {name}: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(f"chosen: {tuned.folder / 'chosen.toml'}", highlight=False, markup=False, soft_wrap=True)


def _as_json(tuned: Tuned) -> dict[str, Any]:
    return {
        "metric": tuned.metric,
        "larger_is_better": larger_is_better(tuned.metric),
        "measured_on": "validation rows of the clients",
        "trials_of_each_variant": len(tuned.trials) // len({trial.variant for trial in tuned.trials}),
        "trials": [
            {**asdict(trial), "score": trial.score, "chosen": tuned.chosen.get(trial.variant) is trial}
            for trial in tuned.trials
        ],
        "at_edge": dict(tuned.at_edge),
    }


def _as_csv(tuned: Tuned) -> str:
    keys = sorted({key for trial in tuned.trials for key in trial.overrides})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", "trial", *keys, tuned.metric, "chosen", "states"])
    for trial in tuned.trials:
        score = "" if trial.score is None or math.isnan(trial.score) else trial.score
        values = [trial.overrides.get(key, "") for key in keys]
        is_best = tuned.chosen.get(trial.variant) is trial
        writer.writerow(
            map(
                spreadsheet_cell,
                [trial.variant, trial.number, *values, score, is_best, " ".join(trial.states.values())],
            )
        )
    return text.getvalue()


def _in_words(overrides: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in overrides.items())
