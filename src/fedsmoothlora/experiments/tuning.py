"""Choose settings for methods and variants: the same number of trials for each, on validation rows.

========================  ======================================================================
``tuning.toml``           the settings that all trials share, and every trial
``runs/LABEL/trial-01/seed-1000000/``  one run, an ordinary run folder
``tuned.json``            all trials with their scores, and the chosen ones
``tuned.csv``             the same, one row for each trial
``chosen.toml``           the chosen settings of each variant with the record of their tuning;
                          `compare --methods DIR/chosen.toml` reads it
========================  ======================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedsmoothlora.config import Config, read
from fedsmoothlora.errors import ConfigError, InterruptedRunError
from fedsmoothlora.experiments.budget import Budget, budget_of
from fedsmoothlora.experiments.budget_tables import print_budget
from fedsmoothlora.experiments.compare import FIRST_TUNING_SEED
from fedsmoothlora.experiments.execution import run_all, side_by_side
from fedsmoothlora.experiments.folder import remember
from fedsmoothlora.experiments.forecast import Forecast, forecast
from fedsmoothlora.experiments.grid import settings_to_try
from fedsmoothlora.experiments.planned_runs import PlannedRun
from fedsmoothlora.experiments.trials import Trial, Tuned, read_trials, trial_name
from fedsmoothlora.experiments.tuned_files import print_tuned, settings_in_words, write_tuned
from fedsmoothlora.experiments.variants import Variant, collect, to_tables
from fedsmoothlora.federation.masked import check_engine
from fedsmoothlora.runs.planning import plan

__all__ = ["Trial", "Tuned", "dry_run", "prepare", "tune"]

VALIDATION = 0.2
"""The share of each client's rows that trials are scored on, if the configuration keeps none."""

# Beginnings of keys that change the bytes of a round.
_CHANGES_BYTES = (
    *("lora.", "transport.", "training.scaffold", "method.preset", "method.server_rank"),
    *("method.energy", "method.heads", "method.refactor_every"),  # florist, ravan, fed_svd
)
# Values of ``method.gradient_aligned`` for which clients send whole gradients too.
_SENDS_GRADIENTS = ("shared", "shuffled")


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
    bytes_like: str | None = None,
    console: Console | None = None,
) -> Tuned:
    """Try the same number of settings for every method or variant, and choose the best. Resumable.

    A share of each client's rows is kept for validation (``data.validation``; 0.2 if the configuration keeps
    none). A trial trains on the other rows; its score is the metric on the validation rows after the last
    round. Tuning never uses the test set or a seed of `compare`. A trial that diverges, or whose loss
    explodes, counts as a trial but is never chosen.

    Args:
        config: a TOML file, a recipe's name, or a table.
        methods: the variants, as in `compare`: methods by name, ``LABEL: METHOD KEY=VALUE ...``, or files.
        grid: values by key. ``KEY`` holds for all methods that have it. ``METHOD:KEY`` replaces it for one
            method, ``LABEL:KEY`` for one variant. Keys that a variant sets itself are not tried.
        overrides: values for all variants, by dotted key.
        out: the folder; if it holds an unfinished tuning, that is continued.
        trials: the number of trials of each variant: the whole grid if it has that many points, else a
            subset drawn by seed. By default the number of points of the smallest grid.
        seeds: the number of runs of every trial; its score is their mean.
        jobs: the number of runs at a time, as in `compare`.
        metric: by default ``accuracy``, or else the task's main metric.
        bytes_like: the label of a variant whose bytes of a round are the budget of all others, as in
            `compare`. The chosen ranks are part of the chosen settings.
        console: where progress is printed; standard output by default.

    Raises:
        ConfigError: an argument is invalid, or a grid has fewer points than trials. Nothing was run.
        PackageError: a package that ships the model or the data is not available.
        InterruptedRunError: Ctrl-C; the same call continues.
    """
    console = console or Console()
    variants = collect(methods)
    settings = settings_to_try(variants, grid, trials, read(config, overrides).seed)
    prepared = prepare(
        config,
        variants,
        settings,
        overrides,
        out=Path(out),
        seeds=seeds,
        jobs=jobs,
        metric=metric,
        bytes_like=bytes_like,
    )
    planned_runs = prepared.planned_runs
    print_budget(prepared.budget, console)
    try:
        run_all(list(planned_runs.values()), jobs, console)
    except InterruptedRunError as error:
        raise InterruptedRunError(f"{error}; the same command continues {out}") from None
    tuned = read_trials(settings, planned_runs, Path(out), metric)
    write_tuned(tuned, prepared.variants)
    print_tuned(tuned, console)
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
    metric: str | None = None,
    bytes_like: str | None = None,
    console: Console | None = None,
) -> dict[str, Forecast]:
    """Measure a few batches of each variant's first trial, and print how long `tune` will take."""
    variants = collect(methods)
    settings = settings_to_try(variants, grid, trials, read(config, overrides).seed)
    console = console or Console()
    prepared = prepare(
        config,
        variants,
        settings,
        overrides,
        out=Path(out),
        seeds=seeds,
        jobs=jobs,
        metric=metric,
        bytes_like=bytes_like,
        begin=False,
    )
    print_budget(prepared.budget, console)
    wanted: dict[str, tuple[Config, int]] = {}
    for (label, _), planned_run in prepared.planned_runs.items():
        planned_run.check()
        variant = label.partition("/")[0]
        first, left = wanted.get(variant, (planned_run.config, 0))
        wanted[variant] = first, left + (planned_run.state in ("waiting", "failed"))
    return forecast(wanted, jobs, console)


@dataclass(frozen=True)
class Prepared:
    """A tuning that was checked and can be run.

    Attributes:
        planned_runs: by ``LABEL/trial-01`` and seed.
        variants: the variants, with their chosen ranks if `bytes_like` was given.
        budget: these ranks; None if they were not chosen.
    """

    planned_runs: Mapping[tuple[str, int], PlannedRun]
    variants: Sequence[Variant]
    budget: Budget | None = None


def prepare(
    config: str | Path | Mapping[str, Any],
    variants: Sequence[Variant],
    settings: Mapping[str, Sequence[Mapping[str, Any]]],
    overrides: Mapping[str, Any] | None,
    *,
    out: Path,
    seeds: int,
    jobs: int,
    metric: str | None = None,
    bytes_like: str | None = None,
    begin: bool = True,
) -> Prepared:
    """Plan and check all trials before the first one starts; ``begin`` creates the folder or adds to it."""
    if seeds < 1 or jobs < 1:
        raise ConfigError(f"--seeds {seeds} --jobs {jobs}: must be at least 1")
    if (privacy := read(config, overrides).privacy).on:
        raise ConfigError(
            f"privacy.unit = {privacy.unit!r}: tuning compares metrics on the clients' validation rows, "
            "which must not leave the clients, and every trial would be a release; tune without it, on "
            "public data"
        )
    check_engine(privacy.secure_aggregation)
    shared = {**(overrides or {}), "evaluation.test": False}
    base = read(config, shared)
    if not base.data.validation:
        shared["data.validation"] = VALIDATION
        base = read(config, shared)
    if base.seed >= FIRST_TUNING_SEED:
        raise ConfigError(
            f"seed = {base.seed}: give the seed of the comparison; tuning adds {FIRST_TUNING_SEED:,} to it"
        )
    first = FIRST_TUNING_SEED + base.seed
    base = replace(base, machine=side_by_side(base.machine, jobs))
    budget = _budget(config, variants, settings, shared, bytes_like, out)
    ranked = budget.applied(variants) if budget else variants
    configs: dict[str, Config] = {}
    for variant in ranked:
        for number, trial in enumerate(settings[variant.label], start=1):
            try:
                one = read(config, {**shared, **variant.overrides, **trial})
                if number == 1:
                    planned = plan(replace(one, seed=first))
                    if metric is not None:
                        planned.check_metric(metric, "--metric", known_only=True)
            except ConfigError as error:
                raise ConfigError(
                    f"{variant.label}, trial {number} {settings_in_words(trial)}: {error}"
                ) from None
            configs[trial_name(variant.label, number)] = one
    tried = {
        variant: {
            f"trial-{number:02d}": {key.replace(".", "_"): value for key, value in trial.items()}
            for number, trial in enumerate(trials, start=1)
        }
        for variant, trials in settings.items()
    }
    plain = to_tables([replace(variant, tuning=None) for variant in variants])
    own = {table.pop("label"): table for table in plain}
    more: dict[str, Any] = {"variant": own, "trial": tried}
    if budget is not None:
        more["bytes_like"] = budget.table()
    base = remember(out / "tuning.toml", base, more, write=begin)
    planned_runs = {
        (label, seed): PlannedRun(
            f"{label}, seed {seed}",
            replace(one, seed=seed, name=f"{base.name}: {label}, seed {seed}", machine=base.machine),
            out / "runs" / label / f"seed-{seed}",
        )
        for label, one in configs.items()
        for seed in range(first, first + seeds)
    }
    return Prepared(planned_runs, ranked, budget)


def _budget(
    config: str | Path | Mapping[str, Any],
    variants: Sequence[Variant],
    settings: Mapping[str, Sequence[Mapping[str, Any]]],
    shared: Mapping[str, Any],
    bytes_like: str | None,
    out: Path,
) -> Budget | None:
    """The variants' ranks at equal bytes, which are the same for all trials (`budget_of`)."""
    configs: dict[str, Config] = {}
    if bytes_like is not None:
        _check_grid(settings)
        configs = {one.label: read(config, {**shared, **one.overrides}) for one in variants}
    return budget_of(bytes_like, variants, configs, out / "tuning.toml")


def _check_grid(settings: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Raise ``ConfigError`` for a key to try that would change the bytes which the ranks are chosen by."""
    tried = [(key, value) for trials in settings.values() for trial in trials for key, value in trial.items()]
    for key, value in tried:
        changes = key.startswith(_CHANGES_BYTES) and key not in ("lora.alpha", "lora.dropout")
        if changes or (key == "method.gradient_aligned" and value in _SENDS_GRADIENTS):
            raise ConfigError(
                f"--grid {key}: changes the bytes of a round, by which --bytes-like chooses the ranks; "
                "give every value a --variant of its own"
            )
