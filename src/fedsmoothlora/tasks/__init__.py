"""The tasks, each one class in one file of this folder; their objectives and metrics in folders of their own."""

from fedsmoothlora.tasks.base import Loaded, Task, TaskData
from fedsmoothlora.tasks.registry import find, names, with_hub_name

__all__ = ["Loaded", "Task", "TaskData", "find", "names", "with_hub_name"]
