"""The command line. Heavy imports are inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsmoothlora.errors import ConfigError, FedSmoothLoRAError, InterruptedRunError

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

    `fedsmoothlora flower init federation --config my.toml --host fl.example.org --certificates certificates`
    """,
    no_args_is_help=True,
    suggest_commands=False,
)
app.add_typer(flower_app, name="flower")

Engine = Literal["in-process", "flower"]
Kind = Literal["recipes", "models", "datasets", "methods", "partitions"]

# What `compare` and `tune` have in common.
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
Metric = Annotated[str | None, typer.Option(help="A figure of the global model. [default: accuracy]")]
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
    from fedsmoothlora.running import resolved
    from fedsmoothlora.running import run as run_config

    overrides = dict(parse_override(text) for text in set_ or [])
    if jobs is not None:
        overrides["machine.jobs"] = jobs
    if out is not None and resume is not None:
        raise ConfigError("--out and --resume: a resumed run goes on in its own folder; give one of them")
    with _interruptible():
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
def compare(
    config: Configured,
    out: Annotated[
        Path, typer.Option(help="The comparison's folder; one that was begun before is gone on with.")
    ],
    methods: Compared = None,
    variant: Varied = None,
    seeds: Annotated[int, typer.Option(help="How many, from the configuration's seed on.")] = 3,
    jobs: RunsAtATime = 1,
    baseline: Annotated[
        str | None, typer.Option(metavar="LABEL", help="What others are compared with. [default: fedit]")
    ] = None,
    metric: Metric = None,
    target: Annotated[
        float | None,
        typer.Option(help="Tell the cost of reaching this value. [default: the baseline's final mean]"),
    ] = None,
    dry_run: DryRun = False,
    set_: SetForAll = None,
) -> None:
    """Compare methods on the same data, partition, start and budget, over several seeds.

    Finished runs are never run again: the same command goes on where it was stopped.

    Examples:

    `fedsmoothlora compare quickstart --methods fedsmoothlora,fedit,frlora --out runs/compared --dry-run`

    `fedsmoothlora compare quickstart --methods fedit --variant 'zeta0: fedsmoothlora method.zeta=0' --out D`

    `fedsmoothlora compare my.toml --methods runs/tuned/chosen.toml --seeds 5 --jobs 2 --out DIR`
    """
    from fedsmoothlora.config import parse_override

    given = _named(methods, variant)
    overrides = dict(parse_override(text) for text in set_ or [])
    from fedsmoothlora.comparison import compare as compare_methods
    from fedsmoothlora.comparison import dry_run as forecast

    if dry_run:
        forecast(config, given, overrides, out=out, seeds=seeds, jobs=jobs)
        return
    with _interruptible():
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
            help="Values to try, for all methods that have the key, or METHOD:KEY or LABEL:KEY for one; "
            "repeatable.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder; one that was begun before is gone on with.")],
    method: Compared = None,
    variant: Varied = None,
    trials: Annotated[
        int | None, typer.Option(help="Of each method. [default: the points of the smallest grid]")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of every trial, whose mean is its score.")] = 1,
    jobs: RunsAtATime = 1,
    metric: Metric = None,
    dry_run: DryRun = False,
    set_: SetForAll = None,
) -> None:
    """Choose settings of methods and variants: as many trials of each, on validation rows, not the test set.

    What is chosen is written as variants for `compare`: `--methods DIR/chosen.toml`.

    Examples:

    `fedsmoothlora tune quickstart --method fedit --grid training.lr=0.001,0.003,0.01 --out runs/tuned`

    `fedsmoothlora tune my.toml --method fedit,frlora --grid training.lr=0.001,0.003,0.01 --out DIR`

    `fedsmoothlora tune my.toml --method fedsmoothlora --grid method.gamma=64,256,512 --trials 2 --out DIR`

    `fedsmoothlora tune X.toml --variant 'a: fedsmoothlora method.zeta=0' --grid training.lr=0.01,0.1 --out A`
    """
    from fedsmoothlora.comparison import grid as grids
    from fedsmoothlora.comparison import tuning
    from fedsmoothlora.config import parse_override

    names = _named(method, variant)
    values = dict(map(grids.parse_grid, grid))
    overrides = dict(parse_override(text) for text in set_ or [])
    if dry_run:
        tuning.dry_run(config, names, values, overrides, out=out, trials=trials, seeds=seeds, jobs=jobs)
        return
    with _interruptible():
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
        )
    if tuned.failed or any(name not in tuned.chosen for name in names):
        raise typer.Exit(1)


def _named(names: list[str] | None, variants: list[str] | None) -> list[str]:
    """Methods and files of variants, separated by commas or given one by one, then variants."""
    found = [name.strip() for given in names or [] for name in given.split(",") if name.strip()]
    return found + (variants or [])


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
def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Of methods: all that docs/methods.md says, measured anew.")
    ] = False,
) -> None:
    """List what there is to choose from.

    Examples:

    `fedsmoothlora list recipes`

    `fedsmoothlora list models`

    `fedsmoothlora list methods --markdown`
    """
    from fedsmoothlora import catalogue

    if markdown:
        if kind != "methods":
            raise ConfigError(f"list {kind} --markdown: only methods have such a table")
        from fedsmoothlora.method_table import document

        print(document(), end="")
        return

    columns, rows = catalogue.entries(kind)
    table = Table(box=None, pad_edge=False)
    for title in columns:
        # Names are to be copied, so they are never cut.
        table.add_column(title, no_wrap=title == columns[0], overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@contextmanager
def _interruptible() -> Iterator[None]:
    """A run that Ctrl-C stopped ends with one line and exit code 130."""
    try:
        yield
    except InterruptedRunError as error:
        Console(stderr=True).print(str(error), highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


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
        raise ConfigError("Flower is not installed: pip install 'fedsmoothlora[flower]'") from None


def main() -> None:
    """Run the command line; an error that a user can fix is printed as one message, with exit code 2."""
    try:
        app()
    except FedSmoothLoRAError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")


def _fail(message: str) -> NoReturn:
    text = Text.assemble(("error:", "bold red"), " ", message)
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
