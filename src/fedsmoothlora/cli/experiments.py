"""Commands that run many federations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsmoothlora.cli.app import (
    Compared,
    Configured,
    DryRun,
    Metric,
    RunsAtATime,
    SetForAll,
    Varied,
    app,
    check_early,
    interruptible,
)


@app.command()
def compare(
    config: Configured,
    out: Annotated[
        Path, typer.Option(help="The comparison's folder; one that was begun before is gone on with.")
    ],
    methods: Compared = None,
    variant: Varied = None,
    seeds: Annotated[int, typer.Option(help="How many, from the configuration's seed on.")] = 3,
    jobs: RunsAtATime = 1,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="LABEL", help="The variant that others are compared with. [default: fedit]"),
    ] = None,
    metric: Metric = None,
    target: Annotated[
        float | None,
        typer.Option(help="Tell the cost of reaching this value. [default: the baseline's final mean]"),
    ] = None,
    dry_run: DryRun = False,
    set_: SetForAll = None,
) -> None:
    """Compare methods on the same data, partition, start and budget, over several seeds.

    Finished runs are never run again: the same command goes on where it was stopped.

    Examples:

    `fedsmoothlora compare quickstart --methods fedsmoothlora,fedit,frlora --out runs/compared --dry-run`

    `fedsmoothlora compare quickstart --methods fedit --variant 'zeta0: fedsmoothlora method.zeta=0' --out D`

    `fedsmoothlora compare my.toml --methods runs/tuned/chosen.toml --seeds 5 --jobs 2 --out DIR`
    """
    from fedsmoothlora.config import parse_override

    given = _named(methods, variant)
    overrides = dict(parse_override(text) for text in set_ or [])
    check_early(config, overrides)
    from fedsmoothlora.experiments.compare import compare as compare_methods
    from fedsmoothlora.experiments.compare import dry_run as forecast

    if dry_run:
        forecast(config, given, overrides, out=out, seeds=seeds, jobs=jobs)
        return
    with interruptible():
        done = compare_methods(
            config,
            given,
            overrides,
            out=out,
            seeds=seeds,
            jobs=jobs,
            baseline=baseline,
            metric=metric,
            target=target,
        )
    if done.failed:
        raise typer.Exit(1)


@app.command()
def tune(
    config: Configured,
    grid: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUE,...",
            help="Values to try, for all methods that have the key, or METHOD:KEY or LABEL:KEY for one; "
            "repeatable.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder; one that was begun before is gone on with.")],
    method: Compared = None,
    variant: Varied = None,
    trials: Annotated[
        int | None, typer.Option(help="Of each method. [default: the points of the smallest grid]")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of every trial, whose mean is its score.")] = 1,
    jobs: RunsAtATime = 1,
    metric: Metric = None,
    dry_run: DryRun = False,
    set_: SetForAll = None,
) -> None:
    """Choose settings of methods and variants: as many trials of each, on validation rows, not the test set.

    The chosen settings are written as variants for `compare`: `--methods DIR/chosen.toml`.

    Examples:

    `fedsmoothlora tune quickstart --method fedit --grid training.lr=0.001,0.003,0.01 --out runs/tuned`

    `fedsmoothlora tune my.toml --method fedit,frlora --grid training.lr=0.001,0.003,0.01 --out DIR`

    `fedsmoothlora tune my.toml --method fedsmoothlora --grid method.gamma=64,256,512 --trials 2 --out DIR`

    `fedsmoothlora tune X.toml --variant 'a: fedsmoothlora method.zeta=0' --grid training.lr=0.01,0.1 --out A`
    """
    from fedsmoothlora.config import parse_override

    overrides = dict(parse_override(text) for text in set_ or [])
    check_early(config, overrides)
    from fedsmoothlora.experiments import grid as grids
    from fedsmoothlora.experiments import tuning

    names = _named(method, variant)
    values = dict(map(grids.parse_grid, grid))
    if dry_run:
        tuning.dry_run(config, names, values, overrides, out=out, trials=trials, seeds=seeds, jobs=jobs)
        return
    with interruptible():
        tuned = tuning.tune(
            config,
            names,
            values,
            overrides,
            out=out,
            trials=trials,
            seeds=seeds,
            jobs=jobs,
            metric=metric,
        )
    if tuned.failed or any(name not in tuned.chosen for name in names):
        raise typer.Exit(1)


def _named(names: list[str] | None, variants: list[str] | None) -> list[str]:
    """Methods and files of variants, separated by commas or given one by one, then variants."""
    found = [name.strip() for given in names or [] for name in given.split(",") if name.strip()]
    return found + (variants or [])
