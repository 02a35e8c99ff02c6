"""The command that lists recipes, models, data sets, methods and partitions."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedsmoothlora.cli.app import (
    Kind,
    app,
)
from fedsmoothlora.errors import ConfigError


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
