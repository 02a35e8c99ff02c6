"""Objectives: the losses and metrics of models."""

from fedsmoothlora.tasks.objectives.base import Evaluation, Objective
from fedsmoothlora.tasks.objectives.classification import Classification, auroc
from fedsmoothlora.tasks.objectives.language import CausalLanguageModel
from fedsmoothlora.tasks.objectives.preference import DirectPreference

__all__ = ["CausalLanguageModel", "Classification", "DirectPreference", "Evaluation", "Objective", "auroc"]
