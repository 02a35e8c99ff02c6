"""The tasks by name: one class in each file of this folder."""

from __future__ import annotations

from fedsmoothlora.plugins import PluginFolder
from fedsmoothlora.tasks.base import Task

_FOLDER: PluginFolder[Task] = PluginFolder("fedsmoothlora.tasks", Task, "task")  # type: ignore[type-abstract]


def names() -> tuple[str, ...]:
    """Names of all tasks, sorted."""
    return tuple(_FOLDER.by_name)


def find(name: str) -> type[Task]:
    """The class of a task.

    Raises ``ConfigError`` that lists the tasks.
    """
    return _FOLDER.find(name)


def with_hub_name(name: str) -> type[Task]:
    """The first task that the Hugging Face hub calls ``name``; all of them load models in the same way."""
    return next(task for task in _FOLDER.by_name.values() if task.hub_name == name)
