"""Commands about configurations: their keys, recipes, files to start from, and old files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedsmoothlora.cli.app import app
from fedsmoothlora.errors import ConfigError

if TYPE_CHECKING:
    from fedsmoothlora.config.reference import Group, Section


@app.command()
def config(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[SECTION[.KEY]]", help="A section or a key; all sections unless given."),
    ] = None,
) -> None:
    """Explain the sections and keys of a configuration: type, default and meaning.

    docs/configuration.md has the same text on one page.

    Examples:

    `fedsmoothlora config`

    `fedsmoothlora config training`

    `fedsmoothlora config method.gamma`
    """
    from fedsmoothlora.config import reference

    console = Console()
    if name is None:
        _print_sections(console, reference.sections())
        return
    section = reference.find(name)
    for group in section.groups:
        _print_group(console, group)


def _print_sections(console: Console, sections: Sequence[Section]) -> None:
    rows = [(f"[{section.name}]", section.summary) for section in sections if section.name]
    console.print(_table(("section", "meaning"), rows))
    console.print(
        f"\nAbove all sections: {', '.join(sections[0].key_names())}.\n"
        "fedsmoothlora config SECTION lists the keys of a section.",
        highlight=False,
    )


def _print_group(console: Console, group: Group) -> None:
    if group.condition:
        console.print(Text.assemble("\n", (group.condition, "bold"), "  ", _plain(group.summary)))
    rows = [
        (
            key.name,
            f"{key.type}: {key.allowed}" if key.allowed else key.type,
            key.default,
            _plain(key.meaning),
        )
        for key in group.keys
    ]
    if rows:
        console.print(_table(("key", "type", "default", "meaning"), rows))


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, no_wrap=title == titles[0], overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _plain(text: str) -> str:
    """A docstring's text without the marks of code."""
    return text.replace("``", "").replace("`", "")


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The name of a recipe.")],
) -> None:
    """Print a recipe, a complete configuration in TOML.

    Example:

    `fedsmoothlora show quickstart`
    """
    from fedsmoothlora.config.shipped import recipe_text

    print(recipe_text(recipe), end="")


@app.command()
def init(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="The recipe to copy; left out with --data.")
    ] = None,
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="The new file; RECIPE.toml or PATH.toml here unless given."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Your data: a CSV, JSONL or Parquet file, or a folder."),
    ] = None,
) -> None:
    """Write a configuration to start from: a copy of a recipe, or one for your own data.

    With --data, the task and the columns are guessed from the data. A comment explains every guess: correct
    wrong ones, then run `fedsmoothlora check FILE`. The file is RECIPE.toml or PATH.toml here unless FILE is
    given. A file that exists is never overwritten.

    Examples:

    `fedsmoothlora init quickstart my.toml`

    `fedsmoothlora init --data reviews.csv`

    `fedsmoothlora init --data photos photos.toml`
    """
    from fedsmoothlora.config.shipped import recipe_text
    from fedsmoothlora.config.starting import guessed

    if data is not None:
        if file is not None:
            raise ConfigError(f"init --data takes one file to write, not both {recipe} and {file}")
        # The only argument is the file then.
        text, new = guessed(data), Path(recipe or f"{data.resolve().stem}.toml")
    elif recipe is not None:
        text, new = recipe_text(recipe), Path(file or f"{recipe}.toml")
    else:
        raise ConfigError("init needs a recipe (see `fedsmoothlora list recipes`) or --data PATH")
    _write_new(new, text)
    print(f"{new}: edit it, then run: fedsmoothlora check {new}")


def _write_new(file: Path, text: str) -> None:
    from fedsmoothlora.storage.files import write_text

    if file.exists():
        raise ConfigError(f"{file} exists and is not overwritten; name another file")
    write_text(file, text)


@app.command()
def migrate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A configuration of an older version.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the differences and leave the file as it is.")
    ] = False,
) -> None:
    """Rewrite an old configuration with the new names of its keys, and print the differences.

    Comments and formatting stay. The file is written whole, or not at all if a key cannot be renamed.

    Examples:

    `fedsmoothlora migrate my.toml --dry-run`

    `fedsmoothlora migrate my.toml`
    """
    from fedsmoothlora.config.renamed import RENAMED

    differences = rewrite(file, RENAMED, dry_run=dry_run)
    print("\n".join(differences) or f"{file}: all names are current; nothing to do")


def rewrite(file: Path, renamed: Mapping[str, str], *, dry_run: bool) -> list[str]:
    """Rewrite a configuration file with new names, and return the differences as lines of a unified diff.

    Args:
        file: the file.
        renamed: new dotted keys by old ones.
        dry_run: leave the file as it is.

    Raises:
        ConfigError: the file cannot be read, or a key cannot be renamed; the file is unchanged.
        StorageError: the file cannot be written; it is unchanged.
    """
    from fedsmoothlora.config.migration import migrated
    from fedsmoothlora.config.reading import config_text
    from fedsmoothlora.storage.files import write_bytes

    old = config_text(file)
    try:
        new = migrated(old, renamed)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    if new != old and not dry_run:
        write_bytes(file, new.encode())
    names = (str(file), f"{file} (new names)")
    return list(difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm="", n=1))
