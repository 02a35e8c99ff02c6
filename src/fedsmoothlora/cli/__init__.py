"""The command line: one file per group of commands."""

from fedsmoothlora.cli.app import app
from fedsmoothlora.cli.main import main

__all__ = ["app", "main"]
