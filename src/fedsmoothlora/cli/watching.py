"""The command that shows runs while they train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedsmoothlora.cli.app import app
from fedsmoothlora.errors import ConfigError


@app.command()
def watch(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RUN_DIR|FOLDER", help="The folder of a run, or a folder with runs in it."),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8090,
    host: Annotated[
        str, typer.Option(help="The address to serve. Every address but this machine's own asks for a token.")
    ] = "127.0.0.1",
    token: Annotated[
        str | None,
        typer.Option(
            envvar="FEDSMOOTHLORA_WATCH_TOKEN",
            show_envvar=True,
            help="The token of a reader, 16 characters or more. [default: a new one if one is needed]",
        ),
    ] = None,
) -> None:
    """Show runs in a browser while they train: rounds, clients, curves, bytes, epsilon, refusals, the log.

    The page only reads the files of the runs, and changes nothing. Several runs can be shown side by side.
    The folder of a coordinator's run works too.

    Examples:

    `fedsmoothlora watch runs`

    `fedsmoothlora watch runs/long --port 9000`

    `fedsmoothlora watch runs --host 0.0.0.0`
    """
    try:
        from fedsmoothlora.watching.server import watch as serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("anyio", "starlette", "uvicorn"):
            raise
        raise ConfigError("watch needs Starlette and uvicorn: pip install 'fedsmoothlora[watch]'") from None
    serve(folder, host=host, port=port, token=token)
