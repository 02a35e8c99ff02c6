"""The files of deploy/, and the commands in them."""

from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"


def services() -> dict[str, dict[str, Any]]:
    """The services of compose.yaml by name."""
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]


def shell_commands(command: list[str]) -> str:
    """The commands of ``sh -c``, one a line, as the shell of a container gets them from Docker Compose."""
    shell, flag, commands = command
    assert (shell, flag) == ("sh", "-c")
    return commands.replace("$$", "$")


def manifests(name: str) -> list[dict[str, Any]]:
    """The objects of a Kubernetes manifest."""
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text(encoding="utf-8")))
