"""Objectives: the losses and metrics of models."""

from fedsmoothlora.tasks.objectives.base import Evaluation, Objective
from fedsmoothlora.tasks.objectives.classification import Classification, auroc
from fedsmoothlora.tasks.objectives.language import CausalLanguageModel

__all__ = ["CausalLanguageModel", "Classification", "Evaluation", "Objective", "auroc"]
