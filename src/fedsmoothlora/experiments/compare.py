"""Methods and their variants on the same data, partition, start and budget, over several seeds.

========================  ======================================================================
``comparison.toml``       what all runs have in common, and every variant
``runs/LABEL/seed-0/``    one run, an ordinary folder: `run --resume` and `report` take it
``runs/LABEL/seed-0.json``  why a run did not finish, if it did not
``comparison.csv``        one row a variant
``runs.csv``              one row a run
``comparison.md``         the same as tables for people
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
from fedsmoothlora.experiments.execution import run_all, side_by_side
from fedsmoothlora.experiments.folder import remember
from fedsmoothlora.experiments.forecast import Forecast, forecast
from fedsmoothlora.experiments.planned_runs import PlannedRun
from fedsmoothlora.experiments.results import Results, read_results
from fedsmoothlora.experiments.variants import Variant, collect, to_tables
from fedsmoothlora.runs.planning import Plan, plan
from fedsmoothlora.storage.files import write_text

__all__ = ["Comparison", "Variant", "compare", "dry_run"]

FIRST_TUNING_SEED = 1_000_000
"""Seeds from here on are `fedsmoothlora tune`'s: what was tuned on is never compared on."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was compared, and what it came to.

    Attributes:
        folder: all of it.
        results: metrics by variant and seed.
        failed: why runs failed, by their names; those that diverged are results, not failures.
    """

    folder: Path
    results: Results
    failed: Mapping[str, str]

    @property
    def page(self) -> Path:
        """The page."""
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
    console: Console | None = None,
) -> Comparison:
    """Run every method with every seed, and say how they differ. What is finished is not run again.

    Run ``k`` of each method has the seed ``config.seed + k``, which draws the partition, the head and the
    batches: the same for all methods, so that differences are paired.

    Args:
        config: a TOML file, a recipe's name, or a table.
        methods: what to compare: methods by name, ``LABEL: METHOD KEY=VALUE ...``, TOML files of variants.
        overrides: values for all, by dotted key. ``evaluation.diagnostics`` is on unless it is among them.
        out: the comparison's folder. More methods and seeds may be added to it later; nothing else changes.
        seeds: how many.
        jobs: runs at a time. ``machine.threads`` is divided among them when the folder begins, and stays.
        baseline: the label that others are compared with; ``fedit`` where it is there, else the first.
        metric: a figure of the global model; ``accuracy``, or ``loss`` where there is none.
        target: the value of it whose cost is told; the baseline's final mean unless given.
        console: where progress is shown; standard output unless given.

    Raises:
        ConfigError: something cannot be right, or the folder holds another comparison. Nothing was run.
        PackageError: a package that ships the model or the data cannot be had.
        InterruptedRunError: Ctrl-C; the same call goes on.
    """
    console = console or Console()
    variants = collect(methods)
    _check_baseline(baseline, variants)
    prepared = prepare(config, variants, overrides, out=Path(out), seeds=seeds, jobs=jobs)
    planned_runs = prepared.planned_runs
    stopped = None
    try:
        run_all(list(planned_runs.values()), jobs, console)
    except InterruptedRunError as error:
        stopped = InterruptedRunError(f"{error}; the same command goes on with {out}")
    # After Ctrl-C too: what there is may be enough to see.
    results = read_results(
        planned_runs,
        baseline=baseline,
        metric=metric,
        target=target,
        on_test=prepared.planned.test is not None,
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
    console: Console | None = None,
) -> dict[str, Forecast]:
    """Measure a few batches of each variant, and say how long `compare` will take; nothing is written.

    Arguments and errors are those of `compare`.

    Returns:
        What one run of each variant takes, by label; variants whose runs are all finished are left out.
    """
    planned_runs = prepare(
        config, collect(methods), overrides, out=Path(out), seeds=seeds, jobs=jobs, begin=False
    ).planned_runs
    wanted: dict[str, tuple[Config, int]] = {}
    for (label, _), planned_run in planned_runs.items():
        planned_run.check()
        first, left = wanted.get(label, (planned_run.config, 0))
        wanted[label] = first, left + (planned_run.state in ("waiting", "failed"))
    return forecast(wanted, jobs, console or Console())


@dataclass(frozen=True)
class Prepared:
    """A comparison that nothing speaks against.

    Attributes:
        runs: by label and seed, in the order in which they are run.
        planned: what is known of its first run.
    """

    planned_runs: Mapping[tuple[str, int], PlannedRun]
    planned: Plan


def prepare(
    config: str | Path | Mapping[str, Any],
    variants: Sequence[Variant],
    overrides: Mapping[str, Any] | None = None,
    *,
    out: Path,
    seeds: int,
    jobs: int,
    begin: bool = True,
) -> Prepared:
    """The runs, everything checked that can be before any is run; ``begin`` makes the folder."""
    if seeds < 1 or jobs < 1:
        raise ConfigError(f"--seeds {seeds} --jobs {jobs}: must be at least 1")
    shared = {"evaluation.diagnostics": True, **(overrides or {})}
    base = read(config, shared)
    if base.seed + seeds > FIRST_TUNING_SEED:
        raise ConfigError(f"seed = {base.seed}: seeds from {FIRST_TUNING_SEED:,} on are for tuning")
    base = replace(base, machine=side_by_side(base.machine, jobs))
    configs = {variant.label: resolved(config, shared, variant, base) for variant in variants}
    # The first for all seeds, since every one deals the rows anew; the others for what is their own.
    planned = [plan(replace(configs[variants[0].label], seed=base.seed + k)) for k in range(seeds)]
    for variant in variants[1:]:
        plan(configs[variant.label])
    if begin:
        more = {"variant": {table.pop("label"): table for table in to_tables(variants)}}
        base = remember(out / "comparison.toml", base, more)
    planned_runs = {
        (label, seed): PlannedRun(
            f"{label}, seed {seed}",
            replace(one, seed=seed, name=f"{base.name}: {label}, seed {seed}", machine=base.machine),
            out / "runs" / label / f"seed-{seed}",
        )
        for seed in range(base.seed, base.seed + seeds)
        for label, one in configs.items()
    }
    return Prepared(planned_runs, planned[0])


def resolved(
    config: str | Path | Mapping[str, Any], shared: Mapping[str, Any], variant: Variant, base: Config
) -> Config:
    """A variant's configuration; ``ConfigError`` names the variant."""
    try:
        found = read(config, {**shared, **variant.overrides})
    except ConfigError as error:
        raise ConfigError(f"{variant.label}: {error}") from None
    if not found.method.traits.global_model and found.data.validation:
        # Their clients' own models are all that there is to measure on the clients' rows.
        found = replace(found, evaluation=replace(found.evaluation, clients=True))
    return found


def _check_baseline(baseline: str | None, variants: Sequence[Variant]) -> None:
    labels = [variant.label for variant in variants]
    if baseline is not None and baseline not in labels:
        raise ConfigError(f"--baseline {baseline}: is not among what is compared: {', '.join(labels)}")


def _written(
    results: Results, planned_runs: Mapping[tuple[str, int], PlannedRun], out: Path, console: Console
) -> Comparison:
    """Write tables and page, and print what they come to."""
    # Here, since matplotlib takes a while to load.
    from fedsmoothlora.experiments import tables
    from fedsmoothlora.experiments.page import page

    write_text(out / "comparison.csv", tables.variants_csv(results))
    write_text(out / "runs.csv", tables.runs_csv(results))
    write_text(out / "comparison.md", tables.markdown(results))
    write_text(out / "comparison.html", page(results))
    console.print(tables.terminal(results))
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
