"""The command that lists recipes, models, data sets, methods and partitions."""

from __future__ import annotations

from itertools import groupby
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedsmoothlora.cli.app import Kind, app


@app.command(name="list")
def list_(
    kind: Annotated[Kind, typer.Argument(help="The kind of entries to list.")],
) -> None:
    """List the available recipes, models, data sets, methods or partitions.

    Examples:

    `fedsmoothlora list recipes`

    `fedsmoothlora list models`
    """
    from fedsmoothlora.cli import catalogue

    columns, rows = catalogue.entries(kind)
    table = Table(box=None, pad_edge=False)
    for title in columns:
        # Names are copied, so they are never cut.
        table.add_column(title, no_wrap=title == columns[0], overflow="fold")
    for group, members in groupby(rows, key=lambda row: catalogue.group_of(kind, row[0])):
        if group:
            table.add_row("", f"[bold]{group}[/]")
        for row in members:
            table.add_row(*row)
    Console().print(table)
