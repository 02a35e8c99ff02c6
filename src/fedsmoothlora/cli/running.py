"""Commands that run and check one federation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedsmoothlora.cli.app import Engine, app, flower_module, interruptible
from fedsmoothlora.errors import ConfigError


@app.command()
def run(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG.toml|RECIPE", help="A TOML file, or a recipe's name.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the configuration; repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder, new or empty. [default: runs/NAME-TIME]")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with the run in DIR where it was stopped.")
    ] = None,
    engine: Annotated[
        Engine,
        typer.Option(help="Where clients are: in this process, or in processes of their own by Flower."),
    ] = "in-process",
    jobs: Annotated[
        int | None,
        typer.Option(
            help="Clients at a time, each in a process of its own with machine.threads threads; changes no "
            "result. [default: machine.jobs, 1 unless set]"
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show debug messages too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")] = False,
) -> None:
    """Run a federation on this machine.

    Examples:

    `fedsmoothlora run quickstart`

    `fedsmoothlora run quickstart --set training.rounds=20 --set method.gamma=512 --out runs/long`

    `fedsmoothlora run my.toml --set machine.threads=1 --jobs 4`

    `fedsmoothlora run --resume runs/long`
    """
    from fedsmoothlora.config import parse_override
    from fedsmoothlora.runs.folders import resolved
    from fedsmoothlora.runs.session import run as run_config

    overrides = dict(parse_override(text) for text in set_ or [])
    if jobs is not None:
        overrides["machine.jobs"] = jobs
    if out is not None and resume is not None:
        raise ConfigError("--out and --resume: a resumed run goes on in its own folder; give one of them")
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
        str, typer.Argument(metavar="CONFIG.toml|RECIPE", help="A TOML file, or a recipe's name.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the configuration; repeatable."),
    ] = None,
    site: Annotated[
        str | None, typer.Option(metavar="CLIENT", help="Look at the data of this client alone.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="With --site: where that client's own data are.")
    ] = None,
) -> None:
    """Check all that can be known before training: data, labels, partition, layers, memory, bytes.

    Examples:

    `fedsmoothlora check quickstart`

    `fedsmoothlora check my.toml --site hospital-a --data /data/a`
    """
    from fedsmoothlora.config import parse_override, read
    from fedsmoothlora.runs.check import check as check_config

    overrides = dict(parse_override(text) for text in set_ or [])
    check_config(read(config, overrides), Console(), site=site, data=data)
