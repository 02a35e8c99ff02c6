"""The tasks, each one class in one file of this folder."""

from fedsmoothlora.tasks.base import Loaded, ReadRequest, Task, TaskData
from fedsmoothlora.tasks.registry import find, names, with_hub_name

__all__ = ["Loaded", "ReadRequest", "Task", "TaskData", "find", "names", "with_hub_name"]
