"""Objectives: the losses and metrics of models."""

from fedsmoothlora.tasks.objectives.base import Evaluation, Objective
from fedsmoothlora.tasks.objectives.classification import Classification, auroc
from fedsmoothlora.tasks.objectives.language import CausalLanguageModel
from fedsmoothlora.tasks.objectives.multi_label import MultiLabel
from fedsmoothlora.tasks.objectives.preference import DirectPreference
from fedsmoothlora.tasks.objectives.recordings import RecordingClassification
from fedsmoothlora.tasks.objectives.regression import Regression
from fedsmoothlora.tasks.objectives.sequence_to_sequence import SequenceToSequence
from fedsmoothlora.tasks.objectives.token_classification import TokenClassification

__all__ = [
    "CausalLanguageModel",
    "Classification",
    "DirectPreference",
    "Evaluation",
    "MultiLabel",
    "Objective",
    "RecordingClassification",
    "Regression",
    "SequenceToSequence",
    "TokenClassification",
    "auroc",
]
