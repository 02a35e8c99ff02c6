"""The command that attacks a federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsmoothlora.cli.app import (
    Configured,
    DryRun,
    Metric,
    RunsAtATime,
    SetForAll,
    app,
    check_early,
    interruptible,
    separated,
)


@app.command()
def attack(
    config: Configured,
    out: Annotated[Path, typer.Option(help="The folder of the suite; one that exists is continued.")],
    attacks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="Attacks, each with options if wanted: NAME:KEY=VALUE; repeatable. "
            "[default: sign_flip,scale,one_layer,label_flip,backdoor]",
        ),
    ] = None,
    defences: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="Defences, among them median; repeatable. "
            "[default: mean,clip,geometric_median,multi_krum,trimmed_mean]",
        ),
    ] = None,
    malicious: Annotated[int, typer.Option(help="Malicious clients: the first ones of the partition.")] = 1,
    seeds: Annotated[
        int, typer.Option(help="Number of seeds, beginning with that of the configuration.")
    ] = 3,
    jobs: RunsAtATime = 1,
    metric: Metric = None,
    dry_run: DryRun = False,
    set_: SetForAll = None,
) -> None:
    """Let malicious clients attack, and measure which defence helps, with several seeds.

    Each run is compared with the run without the malicious clients. The same command continues a suite that
    was stopped. Finished runs are never repeated.

    Examples:

    `fedsmoothlora attack quickstart --set partition.clients=7 --out runs/attacked --dry-run`

    `fedsmoothlora attack my.toml --attacks sign_flip,scale:factor=3 --defences mean,median --out DIR`

    `fedsmoothlora attack my.toml --attacks backdoor:target=cat:share=0.3 --malicious 2 --out DIR`
    """
    from fedsmoothlora.config import parse_override

    overrides = dict(parse_override(text) for text in set_ or [])
    check_early(config, overrides)
    from fedsmoothlora.experiments.attack_suite import suite

    named, defended = separated(attacks) or suite.ATTACKS, separated(defences) or suite.DEFENCES
    if dry_run:
        suite.dry_run(
            config,
            named,
            overrides,
            out=out,
            defences=defended,
            malicious=malicious,
            seeds=seeds,
            jobs=jobs,
        )
        return
    with interruptible():
        done = suite.attack(
            config,
            named,
            overrides,
            out=out,
            defences=defended,
            malicious=malicious,
            seeds=seeds,
            jobs=jobs,
            metric=metric,
        )
    if done.failed:
        raise typer.Exit(1)
