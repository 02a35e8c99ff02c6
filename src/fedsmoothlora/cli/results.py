"""Commands that use a run: its report, its model, and answers of its model."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedsmoothlora.cli.app import app

if TYPE_CHECKING:
    from rich.table import Table

    from fedsmoothlora.exports.evaluation import Score
    from fedsmoothlora.exports.push import ExportedFile

_Device = Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="The device that computes.")]


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run, finished or not.")],
) -> None:
    """Write a run's charts and its report again, one self-contained page: DIR/report.html.

    Example:

    `fedsmoothlora report runs/quickstart-20260101-120000`
    """
    from fedsmoothlora.reports.report import write_report

    Console().print(str(write_report(folder)), highlight=False, markup=False, soft_wrap=True)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run, finished or not.")],
    out: Annotated[
        Path | None, typer.Option(help="A new or empty folder. It can be left out with --push.")
    ] = None,
    as_: Annotated[
        str, typer.Option("--as", metavar="merged|adapter|adapter:RANK", help="The form of the export.")
    ] = "adapter",
    client: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Export the model of this client instead of the global one."),
    ] = None,
    round_: Annotated[
        int | None,
        typer.Option(
            "--round", min=0, help="Export the checkpoint after this many rounds. [default: the newest]"
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Also push the export to this repository of the Hugging Face hub."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: the repository is private.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --push: do not ask.")] = False,
) -> None:
    """Write a run's model for other tools: a whole model, or one PEFT LoRA on the pretrained model.

    `merged` writes a whole model. `adapter` writes the exact sum of all rounds as one LoRA. `adapter:RANK`
    writes the best approximation with that rank and the relative error of each layer.

    `--push` lists the files and asks before it sends them. It uses the login of `hf auth login` or HF_TOKEN.

    Examples:

    `fedsmoothlora export runs/long --as merged --out my-model`

    `fedsmoothlora export runs/long --as adapter:16 --out my-adapter`

    `fedsmoothlora export runs/long --client 2 --out adapter-of-client-2`

    `fedsmoothlora export runs/long --push me/my-adapter --private`
    """
    from fedsmoothlora.errors import ExportError

    if push is None:
        if private or yes:
            raise ExportError("--private and --yes go with --push")
        if out is None:
            raise ExportError("--out: give a new or empty folder, or --push REPO")
    elif client is not None:
        raise ExportError("--push: a client's own model stays with the client; leave out --client or --push")
    elif not (yes or sys.stdin.isatty()):
        raise ExportError("--push: there is no terminal on which to ask; add --yes")
    from tempfile import TemporaryDirectory

    from fedsmoothlora.exports.export import export as export_run

    if push is None:
        assert out is not None
        export_run(folder, as_, out=out, client=client, round=round_)
        return
    from fedsmoothlora.exports.push import Repository

    repository = Repository(push)
    user = repository.check()
    with TemporaryDirectory() as temporary:
        console = Console()
        target = Path(temporary) / "export" if out is None else out
        export_run(
            folder, as_, out=target, round=round_, console=Console(quiet=True) if out is None else None
        )
        address = repository.push(
            target, private=private, confirm=lambda files: _confirmed(files, target, push, user, yes=yes)
        )
    console.print(
        "nothing was pushed" if address is None else f"pushed: {address}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _confirmed(files: Sequence[ExportedFile], folder: Path, repo: str, user: str, *, yes: bool) -> bool:
    """List the files, and ask unless ``yes``."""
    from fedsmoothlora.exports.push import paths_named
    from fedsmoothlora.printable import printable
    from fedsmoothlora.reports.formats import readable_bytes

    lines = [f"  {printable(file.name)} ({readable_bytes(file.size)})" for file in files]
    lines += [f"they name a folder of this machine: {printable(path)}" for path in paths_named(folder)]
    console = Console()
    for line in [f"files for {repo}, as {printable(user)}:", *lines]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return yes or typer.confirm("Push these files?")


@app.command()
def generate(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_DIR|EXPORT_DIR", help="The folder of a run or of an export.")
    ],
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; a JSON object if the run's prompts have several columns."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Chat: read the user's turns from standard input, one a line.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of the answer.")] = 128,
    temperature: Annotated[
        float,
        typer.Option(min=0, help="0 takes the most likely token in each step; above 0, tokens are drawn."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawn tokens.")] = 0,
    device: _Device = "auto",
) -> None:
    """Let a trained language model answer a prompt, in the template of its training.

    If the run's prompts have several columns with text between them, give the columns as a JSON object.
    `--chat` answers every line of standard input as a turn of one chat, in the tokenizer's chat template.
    PROMPT, if it is given, is the first turn.

    Examples:

    `fedsmoothlora generate runs/long "Tom has 3 apples and buys 4 more. How many are there?"`

    `fedsmoothlora generate my-adapter "Once upon a time" --temperature 0.8 --seed 1`

    `fedsmoothlora generate runs/long --chat`
    """
    from fedsmoothlora.exports.generation import Conversation, load_writer

    if prompt is None and not chat:
        raise typer.BadParameter("give a prompt, or --chat", param_hint="PROMPT")
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    writer = load_writer(folder, device=device)
    if not chat:
        print(writer.write(str(prompt), **options).strip())  # type: ignore[arg-type]
        return
    conversation = Conversation(writer, options)
    for turn in _turns(prompt):
        print(conversation.say(turn), flush=True)


@app.command()
def evaluate(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_DIR|EXPORT_DIR", help="The folder of a run or of an export.")
    ],
    suite: Annotated[
        str | None, typer.Option(metavar="medical|finance|general", help="The suite of questions.")
    ] = None,
    own: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Questions of your own: the Financial PhraseBank (finance), MMLU by subject (general).",
        ),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Tasks of lm-eval, separated by commas, in place of a suite."),
    ] = None,
    include: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with files of further tasks of lm-eval.")
    ] = None,
    rows: Annotated[
        int,
        typer.Option(
            min=0, help="Questions of each benchmark; 0 takes all. A suite draws them by a fixed seed."
        ),
    ] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of questions in a batch.")] = 8,
    device: _Device = "auto",
) -> None:
    """Evaluate a trained language model on a suite of questions, beside the model it was trained from.

    The questions come from a PyPI package, so no data hub is needed: `medical` is PubMedQA, MedMCQA, MedQA
    and MMLU's clinical subjects, `finance` the answers of FiQA, and `general` MMLU. With `--lm-eval`, the
    tasks are those of EleutherAI's lm-eval, most of which need a hub.

    Examples:

    `fedsmoothlora evaluate runs/long --suite medical`

    `fedsmoothlora evaluate runs/long --suite general --data mmlu/test`

    `fedsmoothlora evaluate runs/long --lm-eval mmlu,hellaswag`
    """
    if (suite is None) == (lm_eval is None):
        raise typer.BadParameter("give one of them", param_hint="--suite, --lm-eval")
    if own is not None and suite is None:
        raise typer.BadParameter("it belongs to --suite", param_hint="--data")
    if include is not None and lm_eval is None:
        raise typer.BadParameter("it belongs to --lm-eval", param_hint="--include")
    from fedsmoothlora.exports.evaluation import evaluate as evaluate_suite
    from fedsmoothlora.exports.harness import evaluate_with_lm_eval

    errors = Console(stderr=True)
    options: dict[str, Any] = {
        "rows": rows or None,
        "batch_size": batch_size,
        "device": device,
        "notify": lambda text: errors.print(text, highlight=False, markup=False),
    }
    if suite is not None:
        scores = evaluate_suite(folder, suite, own=own, **options)
    else:
        names = [name.strip() for name in str(lm_eval).split(",") if name.strip()]
        scores = evaluate_with_lm_eval(folder, names, include=include, **options)
    Console().print(_score_table(scores))


def _score_table(scores: Sequence[Score]) -> Table:
    """A table of the scores of the trained and the base model."""
    from rich.table import Table

    table = Table(
        "benchmark", "metric", "questions", "base model", "trained model", "95 % interval", "change"
    )
    for score in scores:
        interval = "" if score.interval is None else "{:.3f} to {:.3f}".format(*score.interval)
        base, change = "", ""
        if score.base is not None:
            base, change = f"{score.base:.3f}", f"{score.trained - score.base:+.3f}"
        table.add_row(
            score.benchmark, score.metric, str(score.rows), base, f"{score.trained:.3f}", interval, change
        )
    return table


def _turns(first: str | None) -> Iterator[str]:
    """The user's turns: the first, if it is given, and the lines of standard input that are not blank."""
    if first is not None:
        yield first
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
