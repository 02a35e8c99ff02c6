"""The command line's application, and what several commands share. Heavy imports are inside the commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from fedsmoothlora.errors import ConfigError, InterruptedRunError

app = typer.Typer(
    name="fedsmoothlora",
    help="Federated LoRA fine-tuning: several parties improve one model while their data stays where it is.",
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # click suggests them too
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,  # older releases of typer show them, secrets and all
    context_settings={"help_option_names": ["-h", "--help"]},
)

flower_app = typer.Typer(
    help="""Federations on several machines, by Flower: see docs/deploy.md.

    Examples:

    `fedsmoothlora flower certificates certificates --host fl.example.org`

    `fedsmoothlora flower key site.key`

    `fedsmoothlora flower init federation --config my.toml --host fl.example.org --keys keys`

    `fedsmoothlora flower run federation --out runs/xrays`
    """,
    no_args_is_help=True,
    suggest_commands=False,
)

app.add_typer(flower_app, name="flower")

Engine = Literal["in-process", "flower"]

Kind = Literal["recipes", "models", "datasets", "methods", "partitions"]

# Arguments of both `compare` and `tune`.
Configured = Annotated[
    str, typer.Argument(metavar="CONFIG.toml|RECIPE", help="A TOML file, or a recipe's name.")
]

Compared = Annotated[
    list[str] | None, typer.Option(metavar="NAME,...", help="Methods, or TOML files of variants; repeatable.")
]

Varied = Annotated[
    list[str] | None,
    typer.Option(metavar="'LABEL: METHOD KEY=VALUE ...'", help="A method with other settings; repeatable."),
]

RunsAtATime = Annotated[
    int, typer.Option(help="Runs at a time; machine.threads is divided among them when DIR begins.")
]

Metric = Annotated[str | None, typer.Option(help="A metric of the global model. [default: accuracy]")]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Measure a few batches of each, and say how long it will take.")
]

SetForAll = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value for all; repeatable.")
]


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


@contextmanager
def interruptible() -> Iterator[None]:
    """A run that Ctrl-C stopped ends with one line and exit code 130."""
    try:
        yield
    except InterruptedRunError as error:
        Console(stderr=True).print(str(error), highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def flower_module(module: str) -> Any:
    """A module of the Flower engine. Raises ``ConfigError`` where Flower is not installed."""
    from importlib import import_module

    try:
        return import_module(f"fedsmoothlora.flower.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("flwr", "cryptography"):
            raise
        raise ConfigError("Flower is not installed: pip install 'fedsmoothlora[flower]'") from None
