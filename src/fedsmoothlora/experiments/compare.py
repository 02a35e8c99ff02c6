"""Compare methods and variants on the same data, partition, initial model and budget, over several seeds.

========================  ======================================================================
``comparison.toml``       the settings that all runs share, and every variant
``runs/LABEL/seed-0/``    one run, an ordinary run folder: `run --resume` and `report` take it
``runs/LABEL/seed-0.json``  why this run diverged or failed; no file for other runs
``comparison.csv``        one row for each variant
``runs.csv``              one row for each run
``comparison.md``         the tables of the page as Markdown
``comparison.html``       the page
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
from fedsmoothlora.experiments.budget_tables import budget_notes, print_budget
from fedsmoothlora.experiments.execution import run_all, side_by_side
from fedsmoothlora.experiments.folder import remember
from fedsmoothlora.experiments.forecast import Forecast, forecast
from fedsmoothlora.experiments.planned_runs import PlannedRun
from fedsmoothlora.experiments.results import Results, read_results
from fedsmoothlora.experiments.tuning_record import TuningStatus, status_of
from fedsmoothlora.experiments.variants import Variant, collect, to_tables
from fedsmoothlora.federation.masked import check_engine
from fedsmoothlora.runs.planning import Plan, plan
from fedsmoothlora.storage.files import write_text

__all__ = ["Comparison", "Variant", "compare", "dry_run"]

FIRST_TUNING_SEED = 1_000_000
"""`fedsmoothlora tune` uses seeds from here on, so no comparison uses a seed of the tuning."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison and its results.

    Attributes:
        folder: the folder of the comparison.
        results: metrics by variant and seed.
        failed: why runs failed, by name of the run. A run that diverged is a result, not a failure.
    """

    folder: Path
    results: Results
    failed: Mapping[str, str]

    @property
    def page(self) -> Path:
        """The path of the page."""
        return self.folder / "comparison.html"


def compare(
    config: str | Path | Mapping[str, Any],
    methods: Sequence[str | Path | Variant],
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path,
    seeds: int = 3,
    jobs: int = 1,
    baseline: str | None = None,
    metric: str | None = None,
    target: float | None = None,
    bytes_like: str | None = None,
    console: Console | None = None,
) -> Comparison:
    """Run every method with every seed, and report how they differ. Finished runs are not run again.

    Run ``k`` of each method has the seed ``config.seed + k``. It draws the partition, the head and the
    batches, so these are the same for all methods and differences are paired.

    A difference is called ``better`` or ``worse`` only if the settings of both the variant and the baseline
    come from `fedsmoothlora tune` for this configuration; otherwise the verdict is ``untuned``.

    Args:
        config: a TOML file, a recipe's name, or a table.
        methods: methods by name, ``LABEL: METHOD KEY=VALUE ...``, or TOML files of variants.
        overrides: values for all variants, by dotted key. ``evaluation.diagnostics`` is on by
            default, except with ``privacy.unit = "client"``.
        out: the comparison's folder. Methods and seeds can be added later; other settings cannot change.
        seeds: the number of seeds.
        jobs: the number of runs at a time. They share ``machine.threads`` as divided when the folder began.
        baseline: the label that others are compared with; by default ``fedit``, or else the first.
        metric: a metric of the global model; by default ``accuracy``, or else the task's main metric.
        target: the value of the metric whose cost is reported; by default the baseline's final mean.
        bytes_like: the label of a variant whose bytes of a round are the budget of all others: each has the
            largest ``lora.r`` that sends no more than 3 % above it
            (`fedsmoothlora.experiments.budget.budget_of`). By default all have the rank of ``config``.
        console: where progress is printed; standard output by default.

    Raises:
        ConfigError: an argument is invalid, or the folder holds another comparison. Nothing was run.
        PackageError: a package that ships the model or the data is not available.
        InterruptedRunError: Ctrl-C; the same call continues.
    """
    console = console or Console()
    variants = collect(methods)
    _check_baseline(baseline, variants)
    prepared = prepare(
        config,
        variants,
        overrides,
        out=Path(out),
        seeds=seeds,
        jobs=jobs,
        metric=metric,
        bytes_like=bytes_like,
    )
    planned_runs = prepared.planned_runs
    print_budget(prepared.budget, console)
    stopped = None
    try:
        run_all(list(planned_runs.values()), jobs, console)
    except InterruptedRunError as error:
        stopped = InterruptedRunError(f"{error}; the same command continues {out}")
    # After Ctrl-C too: the finished runs may already answer the question.
    results = read_results(
        planned_runs,
        baseline=baseline,
        metric=metric,
        target=target,
        on_test=prepared.planned.test is not None,
        tuning=prepared.tuning,
        budget=prepared.budget,
    )
    done = _written(results, planned_runs, Path(out), console)
    if stopped is not None:
        raise stopped
    return done


def dry_run(
    config: str | Path | Mapping[str, Any],
    methods: Sequence[str | Path | Variant],
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path,
    seeds: int = 3,
    jobs: int = 1,
    metric: str | None = None,
    bytes_like: str | None = None,
    console: Console | None = None,
) -> dict[str, Forecast]:
    """Measure a few batches of each variant, and print how long `compare` will take. Nothing is written.

    Arguments and errors are those of `compare`.

    Returns:
        The forecast of one run by label, for variants that have runs left.
    """
    console = console or Console()
    prepared = prepare(
        config,
        collect(methods),
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
        first, left = wanted.get(label, (planned_run.config, 0))
        wanted[label] = first, left + (planned_run.state in ("waiting", "failed"))
    return forecast(wanted, jobs, console)


@dataclass(frozen=True)
class Prepared:
    """A comparison that was checked and can be run.

    Attributes:
        planned_runs: by label and seed, in the order in which they are run.
        planned: the plan of the first run.
        tuning: by label, whether the variant's settings were tuned.
        budget: the variants' ranks at equal bytes; None if they were not chosen.
    """

    planned_runs: Mapping[tuple[str, int], PlannedRun]
    planned: Plan
    tuning: Mapping[str, TuningStatus]
    budget: Budget | None = None


def prepare(
    config: str | Path | Mapping[str, Any],
    variants: Sequence[Variant],
    overrides: Mapping[str, Any] | None = None,
    *,
    out: Path,
    seeds: int,
    jobs: int,
    metric: str | None = None,
    bytes_like: str | None = None,
    begin: bool = True,
) -> Prepared:
    """Plan and check all runs before the first one starts; ``begin`` creates the folder or adds to it."""
    if seeds < 1 or jobs < 1:
        raise ConfigError(f"--seeds {seeds} --jobs {jobs}: must be at least 1")
    shared = dict(overrides or {})
    base = read(config, shared)
    check_engine(base.privacy.secure_aggregation)
    if not base.privacy.uploads_only:  # with privacy, no diagnostics leave the clients
        shared = {"evaluation.diagnostics": True, **shared}
        base = read(config, shared)
    if base.seed + seeds > FIRST_TUNING_SEED:
        raise ConfigError(f"seed = {base.seed}: seeds from {FIRST_TUNING_SEED:,} on are for tuning")
    base = replace(base, machine=side_by_side(base.machine, jobs))
    configs = {variant.label: resolved(config, shared, variant, base) for variant in variants}
    budget = budget_of(bytes_like, variants, configs, out / "comparison.toml")
    if budget is not None:
        configs = {one.label: resolved(config, shared, one, base) for one in budget.applied(variants)}
    # Each seed deals the rows anew, so the first variant is planned with every seed; the others with one.
    planned = [plan(replace(configs[variants[0].label], seed=base.seed + k)) for k in range(seeds)]
    for variant in variants[1:]:
        plan(configs[variant.label])
    if metric is not None:
        planned[0].check_metric(metric, "--metric", known_only=True)
    # Without the tuning record: tuning again to the same settings leaves the comparison as it is.
    plain = to_tables([replace(variant, tuning=None) for variant in variants])
    more: dict[str, Any] = {"variant": {table.pop("label"): table for table in plain}}
    if budget is not None:
        more["bytes_like"] = budget.table()
    base = remember(out / "comparison.toml", base, more, write=begin)
    planned_runs = {
        (label, seed): PlannedRun(
            f"{label}, seed {seed}",
            replace(one, seed=seed, name=f"{base.name}: {label}, seed {seed}", machine=base.machine),
            out / "runs" / label / f"seed-{seed}",
        )
        for seed in range(base.seed, base.seed + seeds)
        for label, one in configs.items()
    }
    tuning = {one.label: status_of(one.tuning, configs[one.label]) for one in variants}
    return Prepared(planned_runs, planned[0], tuning, budget)


def resolved(
    config: str | Path | Mapping[str, Any], shared: Mapping[str, Any], variant: Variant, base: Config
) -> Config:
    """A variant's configuration; ``ConfigError`` names the variant."""
    try:
        found = read(config, {**shared, **variant.overrides})
    except ConfigError as error:
        raise ConfigError(f"{variant.label}: {error}") from None
    if not found.method.traits.global_model and found.data.validation:
        # Without a global model, only the clients' own models can be evaluated on their rows.
        found = replace(found, evaluation=replace(found.evaluation, clients=True))
    return found


def _check_baseline(baseline: str | None, variants: Sequence[Variant]) -> None:
    labels = [variant.label for variant in variants]
    if baseline is not None and baseline not in labels:
        raise ConfigError(f"--baseline {baseline}: is none of the variants: {', '.join(labels)}")


def _written(
    results: Results, planned_runs: Mapping[tuple[str, int], PlannedRun], out: Path, console: Console
) -> Comparison:
    """Write tables and page, and print the main table with its warnings."""
    # Imported here because matplotlib takes a while to load.
    from fedsmoothlora.experiments import tables
    from fedsmoothlora.experiments.page import page

    write_text(out / "comparison.csv", tables.variants_csv(results))
    write_text(out / "runs.csv", tables.runs_csv(results))
    write_text(out / "comparison.md", tables.markdown(results))
    write_text(out / "comparison.html", page(results))
    console.print(tables.terminal(*tables.quality_table(results)))
    console.print()
    console.print(tables.terminal(*tables.bytes_table(results)))
    for note in [*budget_notes(results.budget), *tables.tuning_notes(results)]:
        console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"tables: {out / 'comparison.md'}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"page:   {out / 'comparison.html'}", highlight=False, markup=False, soft_wrap=True)
    failed = {
        planned_run.name: planned_run.outcome()["reason"]
        for planned_run in planned_runs.values()
        if planned_run.state == "failed"
    }
    for name, reason in failed.items():
        console.print(f"failed: {name}: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
    return Comparison(folder=out, results=results, failed=failed)
