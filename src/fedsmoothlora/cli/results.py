"""Commands that turn a run into pages, models and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedsmoothlora.cli.app import app


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, finished or not.")],
) -> None:
    """Draw a run's pictures again, into one page that needs no network: DIR/report.html.

    Example:

    `fedsmoothlora report runs/quickstart-20260101-120000`
    """
    from fedsmoothlora.reports.report import write_report

    Console().print(str(write_report(folder)), highlight=False, markup=False, soft_wrap=True)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run, finished or not.")],
    out: Annotated[Path, typer.Option(help="A new or empty folder.")],
    as_: Annotated[
        str, typer.Option("--as", metavar="merged|adapter|adapter:RANK", help="The form of the export.")
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
    from fedsmoothlora.exports.export import export as export_run

    export_run(folder, as_, out=out, client=client, round=round_)


@app.command()
def generate(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_DIR|EXPORT_DIR", help="The folder of a run or of an export.")
    ],
    prompt: Annotated[
        str,
        typer.Argument(help="The prompt; a JSON object where the run's prompts have several columns."),
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
    from fedsmoothlora.exports.generation import generate as generate_text

    print(
        generate_text(
            folder, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        ).strip()
    )
