"""Keys of a configuration that may hold a local path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fedsmoothlora.config.model import Config
from fedsmoothlora.data.registry import PREFIX

PATHS = ("model.source", "data.source", "data.path", "data.test", "participation.replay")

Value = TypeVar("Value")


def absolute_paths(config: Config) -> Config:
    """The configuration with absolute local paths, so that the current folder no longer matters."""
    return replace(
        config,
        model=replace(config.model, source=absolute(config.model.source)),
        data=replace(
            config.data,
            source=absolute(config.data.source),
            path=absolute(config.data.path),
            test=absolute(config.data.test),
        ),
        participation=replace(config.participation, replay=absolute(config.participation.replay)),
    )


def absolute(value: Value) -> Value:
    """The absolute path of an existing file or folder; any other value, such as a hub id, is not changed."""
    path = local_path(value)
    return value if path is None else str(path)  # type: ignore[return-value]


def local_path(value: Any) -> Path | None:
    """The absolute path of the existing file or folder that a value names; None if it names none."""
    if not isinstance(value, str) or value.startswith(PREFIX):
        return None
    try:
        path = Path(value).expanduser().absolute()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # a name that no file can have
        return None
