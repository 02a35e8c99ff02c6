"""The command that shows and clears the cache."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedsmoothlora.cli.app import app


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove everything that is listed.")] = False,
) -> None:
    """Show the cache folder's contents, or remove them.

    Packaged models and data are fetched again and features computed again when a run needs them.

    Examples:

    `fedsmoothlora cache`

    `fedsmoothlora cache --clear`
    """
    from fedsmoothlora.data import cache as caches
    from fedsmoothlora.data.packages import cache_folder
    from fedsmoothlora.reports.formats import readable_bytes

    console = Console()
    found = caches.clear() if clear else caches.contents()
    if not found:
        console.print(f"{cache_folder()} holds nothing", highlight=False, markup=False, soft_wrap=True)
        return
    title = f"removed from {cache_folder()}" if clear else str(cache_folder())
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    table = Table("folder", "files", "size", "contents", box=None, pad_edge=False)
    for entry in found:
        table.add_row(entry.folder.name, str(entry.files), readable_bytes(entry.size), entry.about)
    console.print(table)
