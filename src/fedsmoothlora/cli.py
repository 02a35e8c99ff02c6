"""The command line. Heavy imports are inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="fedsmoothlora",
    help="Federated LoRA fine-tuning: several parties improve one model while their data stays where it is.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

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
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show debug messages too.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")] = False,
) -> None:
    """Run a federation in this process.

    Examples:

    `fedsmoothlora run quickstart`

    `fedsmoothlora run quickstart --set training.rounds=20 --set method.gamma=512 --out runs/long`

    `fedsmoothlora run my.toml`

    `fedsmoothlora run --resume runs/long`
    """
    from fedsmoothlora.config import ConfigError, parse_override
    from fedsmoothlora.rounds import InterruptedRunError
    from fedsmoothlora.running import run as run_config

    if out is not None and resume is not None:
        raise ConfigError("--out and --resume: a resumed run goes on in its own folder; give one of them")
    try:
        run_config(
            config,
            dict(parse_override(text) for text in set_ or []),
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
) -> None:
    """Check all that can be known before training: data, labels, partition, layers, memory, bytes.

    Examples:

    `fedsmoothlora check quickstart`

    `fedsmoothlora check my.toml --site hospital-a`
    """
    from fedsmoothlora.check import check as check_config
    from fedsmoothlora.config import parse_override, read

    overrides = dict(parse_override(text) for text in set_ or [])
    check_config(read(config, overrides), Console(), site=site)


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


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run, finished or not.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    as_: Annotated[
        str, typer.Option("--as", metavar="merged|adapter|adapter:RANK", help="What to write.")
    ] = "adapter",
    client: Annotated[
        str | None, typer.Option(metavar="ID", help="This client's own model, not the global one.")
    ] = None,
    round_: Annotated[
        int | None,
        typer.Option("--round", min=0, help="The checkpoint after this many rounds. [default: the newest]"),
    ] = None,
) -> None:
    """Write a run's model so that any tool loads it: a whole model, or one PEFT LoRA on the pretrained one.

    `merged` is a whole model; `adapter` the exact sum of all rounds, of the rank that it has;
    `adapter:RANK` the best approximation of that rank, with each layer's relative error.

    Examples:

    `fedsmoothlora export runs/long --as merged --out my-model`

    `fedsmoothlora export runs/long --as adapter:16 --out my-adapter`

    `fedsmoothlora export runs/long --client 2 --out adapter-of-client-2`
    """
    from fedsmoothlora.exports import export as export_run

    export_run(folder, as_, out=out, client=client, round=round_)


@app.command()
def generate(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_DIR|EXPORT_DIR", help="The folder of a run or of an export.")
    ],
    prompt: Annotated[
        str,
        typer.Argument(help="What to answer; a JSON object where the run's prompts have several columns."),
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where the answer is cut off.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token each time; above, tokens are drawn.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
) -> None:
    """Let a trained language model answer a prompt, written as in its training.

    Examples:

    `fedsmoothlora generate runs/long "Tom has 3 apples and buys 4 more. How many are there?"`

    `fedsmoothlora generate my-adapter "Once upon a time" --temperature 0.8 --seed 1`
    """
    from fedsmoothlora.generation import generate as generate_text

    print(
        generate_text(
            folder, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        ).strip()
    )


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
