"""Packages of metrics that are not installed with this one."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from fedsmoothlora.errors import ConfigError


def check_installed(packages: Sequence[str], key: str) -> None:
    """Raise ``ConfigError`` if a package is missing; ``key`` is the key or value that needs it."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{key} needs the package {missing[0]}, which is not installed: "
            "pip install 'fedsmoothlora[tasks]'"
        )
