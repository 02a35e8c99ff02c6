"""The entry point of the command line."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from fedsmoothlora.cli.app import app
from fedsmoothlora.errors import FedSmoothLoRAError

# Each module registers its commands, in the order in which `--help` lists them.
COMMANDS = [
    import_module(f"fedsmoothlora.cli.{name}")
    for name in (
        *("running", "experiments", "attack", "results", "watching", "listing", "configuration"),
        *("disk", "cache", "flower"),
    )
]


def main() -> None:
    """Run the command line. An error that the user can fix is printed as one message, with exit code 2."""
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
