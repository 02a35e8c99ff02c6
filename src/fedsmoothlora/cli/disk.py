"""The command that lists runs and the disk that they take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedsmoothlora.cli.app import app
from fedsmoothlora.errors import ConfigError


@app.command()
def runs(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder of runs, comparisons or tunings.")
    ] = Path("runs"),
) -> None:
    """List the runs below a folder and the disk that they take, the largest first.

    A run's folder can be removed whole. docs/operations.md says which of its parts a finished run can do
    without.

    Examples:

    `fedsmoothlora runs`

    `fedsmoothlora runs comparisons/quickstart`
    """
    from fedsmoothlora.reports.formats import readable_bytes
    from fedsmoothlora.storage.disk import PARTS, RECORDS, runs_below

    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder")
    found = runs_below(folder)
    console = Console()
    if not found:
        console.print(f"there are no runs below {folder}", highlight=False, markup=False, soft_wrap=True)
        return
    parts = (*PARTS, RECORDS)
    table = Table(box=None, pad_edge=False)
    table.add_column("run", no_wrap=True, overflow="fold")
    for title in ("state", "rounds", "size", *parts):
        table.add_column(title, justify="left" if title == "state" else "right")
    for run in found:
        planned = "?" if run.rounds is None else str(run.rounds)
        sizes = (readable_bytes(run.sizes[part]) if run.sizes[part] else "" for part in parts)
        name = str(run.folder.relative_to(folder))
        table.add_row(
            name if name != "." else str(folder),
            run.state,
            f"{run.round} of {planned}",
            readable_bytes(run.size),
            *sizes,
        )
    console.print(table)
    total = readable_bytes(sum(run.size for run in found))
    console.print(f"{len(found)} run{'s' * (len(found) > 1)}, {total}", highlight=False)
