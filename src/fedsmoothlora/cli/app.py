"""The command line's application, and arguments that several commands share.

Commands import what they need themselves, so that the help is immediate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from fedsmoothlora.errors import ConfigError, InterruptedRunError

app = typer.Typer(
    name="fedsmoothlora",
    help="Federated LoRA fine-tuning: several parties improve one model, and their data stay where they are.",
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # click already does
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,  # they may contain secrets
    context_settings={"help_option_names": ["-h", "--help"]},
)

flower_app = typer.Typer(
    help="""Prepare a federation on several machines with Flower (docs/deploy.md).

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
    str, typer.Argument(metavar="CONFIG.toml|RECIPE", help="A TOML file, or the name of a recipe.")
]

Compared = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME,...", help="Methods, or TOML files with variants; repeatable."),
]

Varied = Annotated[
    list[str] | None,
    typer.Option(metavar="'LABEL: METHOD KEY=VALUE ...'", help="A method with other settings; repeatable."),
]

RunsAtATime = Annotated[
    int, typer.Option(help="Runs at a time; a new folder divides machine.threads among them.")
]

Metric = Annotated[
    str | None,
    typer.Option(help="A metric of the global model. [default: accuracy, or else the task's main metric]"),
]

BytesLike = Annotated[
    str | None,
    typer.Option(
        metavar="LABEL",
        help="Give each variant the largest lora.r that sends no more bytes than this variant; lora.alpha "
        "follows, and a lora.r that a variant sets stays.",
    ),
]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Measure a few batches of each method and estimate the time.")
]

SetForAll = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace a value of the configuration for all runs; KEY= removes it. Repeatable.",
    ),
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


def separated(given: list[str] | None) -> list[str]:
    """Names of a repeatable option, separated by commas or given one by one."""
    return [name.strip() for one in given or [] for name in one.split(",") if name.strip()]


@contextmanager
def interruptible() -> Iterator[None]:
    """End the command with one line and exit code 130 if Ctrl-C stops a run."""
    try:
        yield
    except InterruptedRunError as error:
        Console(stderr=True).print(str(error), highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def check_early(config: str | None, overrides: Mapping[str, Any]) -> None:
    """Refuse a wrong configuration before the libraries that train are imported, which takes seconds."""
    from fedsmoothlora.config import read

    if config is not None:
        read(config, overrides)


def flower_module(module: str) -> Any:
    """A module of the Flower engine. Raises ``ConfigError`` if Flower is not installed."""
    from importlib import import_module

    try:
        return import_module(f"fedsmoothlora.flower.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("flwr", "cryptography"):
            raise
        raise ConfigError("Flower is not installed: pip install 'fedsmoothlora[flower]'") from None
