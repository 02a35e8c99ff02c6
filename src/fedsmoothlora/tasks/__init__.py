"""What is learned: losses, and what evaluations measure. One file a task, one file a costly measurement."""

from fedsmoothlora.tasks.classification import Classification, auroc
from fedsmoothlora.tasks.interface import Evaluation, Measurement, Task
from fedsmoothlora.tasks.language import CausalLanguageModel

__all__ = [
    "CausalLanguageModel",
    "Classification",
    "Evaluation",
    "Measurement",
    "Task",
    "auroc",
]
