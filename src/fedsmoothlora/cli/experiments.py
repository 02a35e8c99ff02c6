"""Commands that run many federations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsmoothlora.cli.app import (
    BytesLike,
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
    separated,
)


@app.command()
def compare(
    config: Configured,
    out: Annotated[Path, typer.Option(help="The folder of the comparison; one that exists is continued.")],
    methods: Compared = None,
    variant: Varied = None,
    seeds: Annotated[
        int, typer.Option(help="Number of seeds, beginning with that of the configuration.")
    ] = 3,
    jobs: RunsAtATime = 1,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="LABEL", help="The variant to compare the others with. [default: fedit]"),
    ] = None,
    metric: Metric = None,
    target: Annotated[
        float | None,
        typer.Option(help="Report the cost of reaching this value. [default: the baseline's final mean]"),
    ] = None,
    bytes_like: BytesLike = None,
    dry_run: DryRun = False,
    set_: SetForAll = None,
) -> None:
    """Compare methods on the same data, partition, start and budget, with several seeds.

    The same command continues a comparison that was stopped. Finished runs are never repeated.

    Examples:

    `fedsmoothlora compare quickstart --methods fedsmoothlora,fedit,frlora --out runs/compared --dry-run`

    `fedsmoothlora compare quickstart --methods fedit --variant 'zeta0: fedsmoothlora method.zeta=0' --out D`

    `fedsmoothlora compare my.toml --methods runs/tuned/chosen.toml --seeds 5 --jobs 2 --out DIR`

    `fedsmoothlora compare quickstart --methods fedit,fedsmoothlora,full --bytes-like fedit --out DIR`
    """
    from fedsmoothlora.config import parse_override

    given = separated(methods) + (variant or [])
    overrides = dict(parse_override(text) for text in set_ or [])
    check_early(config, overrides)
    from fedsmoothlora.experiments.compare import compare as compare_methods
    from fedsmoothlora.experiments.compare import dry_run as forecast

    if dry_run:
        forecast(
            config, given, overrides, out=out, seeds=seeds, jobs=jobs, metric=metric, bytes_like=bytes_like
        )
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
            bytes_like=bytes_like,
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
            help="Values to try for all methods that have the key; METHOD:KEY or LABEL:KEY for one of them; "
            "repeatable.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the trials; one that exists is continued.")],
    method: Compared = None,
    variant: Varied = None,
    trials: Annotated[
        int | None, typer.Option(help="Trials of each method. [default: the points of the smallest grid]")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each trial; its score is their mean.")] = 1,
    jobs: RunsAtATime = 1,
    metric: Metric = None,
    bytes_like: BytesLike = None,
    dry_run: DryRun = False,
    set_: SetForAll = None,
) -> None:
    """Choose settings of methods and variants, with the same number of trials for each.

    Trials are scored on validation rows, never on the test set. The chosen settings are written as variants
    for `compare`: `--methods DIR/chosen.toml`.

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

    names = separated(method) + (variant or [])
    values = grids.parse_grids(grid)
    if dry_run:
        tuning.dry_run(
            config,
            names,
            values,
            overrides,
            out=out,
            trials=trials,
            seeds=seeds,
            jobs=jobs,
            metric=metric,
            bytes_like=bytes_like,
        )
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
            bytes_like=bytes_like,
        )
    if tuned.failed or any(trial.variant not in tuned.chosen for trial in tuned.trials):
        raise typer.Exit(1)
