"""The command line. Heavy imports are inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="fedsmoothlora",
    help="Federated LoRA fine-tuning: several parties improve one model while their data stays where it is.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,  # older releases of typer show them, secrets and all
    context_settings={"help_option_names": ["-h", "--help"]},
)

flower_app = typer.Typer(
    help="Federations on several machines, by Flower: see docs/deploy.md.", no_args_is_help=True
)
app.add_typer(flower_app, name="flower")

Engine = Literal["in-process", "flower"]
Kind = Literal["recipes", "models", "datasets", "methods", "partitions"]


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from fedsmoothlora import __version__

        print(f"fedsmoothlora {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


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
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show debug messages too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")] = False,
) -> None:
    """Run a federation on this machine.

    Examples:

    `fedsmoothlora run quickstart`

    `fedsmoothlora run quickstart --set training.rounds=20 --set method.gamma=512 --out runs/long`

    `fedsmoothlora run my.toml`

    `fedsmoothlora run --resume runs/long`
    """
    from fedsmoothlora.config import ConfigError, parse_override
    from fedsmoothlora.rounds import InterruptedRunError
    from fedsmoothlora.running import resolved
    from fedsmoothlora.running import run as run_config

    overrides = dict(parse_override(text) for text in set_ or [])
    if out is not None and resume is not None:
        raise ConfigError("--out and --resume: a resumed run goes on in its own folder; give one of them")
    try:
        if engine == "flower":
            _flower("local").run_locally(resolved(config, overrides, resume), out=out, resume=resume)
            return
        run_config(
            config,
            overrides,
            out=out,
            resume=resume,
            verbosity=verbose - quiet,
        )
    except InterruptedRunError as error:
        Console(stderr=True).print(str(error), highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


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
    from fedsmoothlora.check import check as check_config
    from fedsmoothlora.config import parse_override, read

    overrides = dict(parse_override(text) for text in set_ or [])
    check_config(read(config, overrides), Console(), site=site, data=data)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, finished or not.")],
) -> None:
    """Draw a run's pictures again, into one page that needs no network: DIR/report.html.

    Example:

    `fedsmoothlora report runs/quickstart-20260101-120000`
    """
    from fedsmoothlora.report import write_report

    Console().print(str(write_report(folder)), highlight=False, markup=False, soft_wrap=True)


@app.command(name="list")
def list_(kind: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List what there is to choose from.

    Examples:

    `fedsmoothlora list recipes`

    `fedsmoothlora list models`
    """
    from fedsmoothlora import catalogue

    columns, rows = catalogue.entries(kind)
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@flower_app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The federation's folder, new or empty.")],
    config: Annotated[str, typer.Option(metavar="CONFIG.toml|RECIPE", help="The configuration of all.")],
    host: Annotated[
        str, typer.Option(help="Name or address by which sites reach the coordinator.")
    ] = "localhost",
    certificates: Annotated[
        Path, typer.Option(metavar="DIR", help="Where `flower certificates` wrote them.")
    ] = Path("certificates"),
    port: Annotated[int, typer.Option(help="The coordinator's port.")] = 8000,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the configuration; repeatable."),
    ] = None,
) -> None:
    """Write what a coordinator needs: the Flower app, its connection, service files.

    Example:

    `fedsmoothlora flower init federation --config my.toml --host fl.example.org --certificates certificates`
    """
    from fedsmoothlora.config import parse_override, read

    overrides = dict(parse_override(text) for text in set_ or [])
    module = _flower("app_folder")
    module.write_app_folder(
        folder,
        read(config, overrides),
        host=host,
        port=port,
        certificates=certificates,
        binary=Path(sys.executable).parent,
    )
    Console().print(f"{folder}: the app, flower.env, services/", highlight=False)


@flower_app.command()
def certificates(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write them.")],
    host: Annotated[
        list[str], typer.Option(help="Name or address by which sites reach the coordinator; repeatable.")
    ],
) -> None:
    """Write the coordinator's TLS certificate: ca.crt goes to every site, server.key stays.

    Example:

    `fedsmoothlora flower certificates certificates --host fl.example.org`
    """
    _flower("keys").write_certificates(folder, host)


@flower_app.command()
def key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The private key, which stays here.")],
) -> None:
    """Write a site's key; FILE.pub goes to the coordinator, who registers it.

    Example:

    `fedsmoothlora flower key site.key`
    """
    Console().print(str(_flower("keys").write_node_key(file)), highlight=False, markup=False, soft_wrap=True)


def _flower(module: str) -> Any:
    """A module of the Flower engine. Raises ``ConfigError`` where Flower is not installed."""
    from importlib import import_module

    try:
        return import_module(f"fedsmoothlora.engines.flower.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("flwr", "cryptography"):
            raise
        from fedsmoothlora.config import ConfigError

        raise ConfigError("Flower is not installed: pip install 'fedsmoothlora[flower]'") from None


def main() -> None:
    """Run the command line; errors that a user can mend are one message and exit code 2, without a trace."""
    try:
        app()
    except (ValueError, RuntimeError, OSError) as error:
        if not _is_ours(error):
            raise
        Console(stderr=True).print(
            f"[bold red]error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(2)


def _is_ours(error: Exception) -> bool:
    """Whether an error is one that this package raises for people to read."""
    return type(error).__module__.startswith("fedsmoothlora.")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


if __name__ == "__main__":
    main()
