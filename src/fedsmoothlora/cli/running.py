"""Commands that run and check one federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedsmoothlora.cli.app import Engine, app, check_early, flower_module, interruptible
from fedsmoothlora.errors import ConfigError


@app.command()
def run(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG.toml|RECIPE", help="A TOML file, or the name of a recipe.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Replace a value of the configuration; KEY= removes it. Repeatable.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder of the run, new or empty. [default: runs/NAME-TIME]")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Continue the run in DIR where it was stopped.")
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(help="Run clients in this process, or each in a process of Flower."),
    ] = "in-process",
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Clients that train at the same time, each in a process with machine.threads threads. It "
            "does not change the result. [default: machine.jobs, 1 unless set]"
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show debug messages too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show only errors.")] = False,
) -> None:
    """Run a federation on this machine.

    Examples:

    `fedsmoothlora run quickstart`

    `fedsmoothlora run quickstart --set training.rounds=20 --set method.gamma=512 --out runs/long`

    `fedsmoothlora run my.toml --set machine.threads=1 --jobs 4`

    `fedsmoothlora run --resume runs/long`
    """
    from fedsmoothlora.config import parse_override

    overrides = dict(parse_override(text) for text in set_ or [])
    if jobs is not None:
        overrides["machine.jobs"] = jobs
    if out is not None and resume is not None:
        raise ConfigError("--out and --resume: a resumed run continues in its own folder; give one of them")
    check_early(config, overrides)
    from fedsmoothlora.runs.folders import resolved
    from fedsmoothlora.runs.session import run as run_config

    with interruptible():
        if engine == "flower":
            flower_module("local").run_locally(resolved(config, overrides, resume), out=out, resume=resume)
            return
        run_config(
            config,
            overrides,
            out=out,
            resume=resume,
            verbosity=verbose - quiet,
        )


@app.command()
def check(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG.toml|RECIPE", help="A TOML file, or the name of a recipe.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Replace a value of the configuration; KEY= removes it. Repeatable.",
        ),
    ] = None,
    site: Annotated[
        str | None, typer.Option(metavar="CLIENT", help="Check the data of this client only.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="With --site, for a client of flower.clients: its data."),
    ] = None,
    no_measure: Annotated[
        bool,
        typer.Option("--no-measure", help="Load no weights and measure no batch, so no time is forecast."),
    ] = False,
) -> None:
    """Check everything that can be checked before training: data, partition, layers, memory, bytes, time.

    Examples:

    `fedsmoothlora check quickstart`

    `fedsmoothlora check my.toml --site hospital-a --data /data/a`
    """
    from fedsmoothlora.config import parse_override, read

    checked = read(config, dict(parse_override(text) for text in set_ or []))
    from fedsmoothlora.runs.check import check as check_config

    check_config(checked, Console(), site=site, data=data, measure=not no_measure)
