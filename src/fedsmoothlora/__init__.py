"""Federated LoRA fine-tuning: FedSmoothLoRA (arXiv 2605.29460) and the field's other methods.

The public API is what ``__all__`` lists:

- `run`, `Federation`, `compare`, `tune` and `attack` train.
- `export`, `load_adapter` and `generate` use trained models.
- `LiveCurves` and `EarlyStopping` are callbacks of a run.
- `Method`, `Task`, `Objective` and `Callback` are the base classes of your own ones.
- `Config` and the classes ``*Settings`` are the sections of a configuration (docs/configuration.md).
- `FedSmoothLoRAError` is the base class of all errors that this package raises for its users.

Every name is imported from its module on first use, so that ``import fedsmoothlora`` stays fast.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsmoothlora.algebra.lowrank import LowRank as LowRank
    from fedsmoothlora.callbacks import Callback as Callback
    from fedsmoothlora.callbacks import EarlyStopping as EarlyStopping
    from fedsmoothlora.callbacks import RunInfo as RunInfo
    from fedsmoothlora.config.model import Config as Config
    from fedsmoothlora.config.settings import CheckpointSettings as CheckpointSettings
    from fedsmoothlora.config.settings import FlowerSettings as FlowerSettings
    from fedsmoothlora.config.settings import TrackingSettings as TrackingSettings
    from fedsmoothlora.data.settings import DataSettings as DataSettings
    from fedsmoothlora.errors import ConfigError as ConfigError
    from fedsmoothlora.errors import DataError as DataError
    from fedsmoothlora.errors import FedSmoothLoRAError as FedSmoothLoRAError
    from fedsmoothlora.errors import MetricError as MetricError
    from fedsmoothlora.experiments.attack_suite.suite import AttackSuite as AttackSuite
    from fedsmoothlora.experiments.attack_suite.suite import attack as attack
    from fedsmoothlora.experiments.compare import Comparison as Comparison
    from fedsmoothlora.experiments.compare import compare as compare
    from fedsmoothlora.experiments.tuning import Tuned as Tuned
    from fedsmoothlora.experiments.tuning import tune as tune
    from fedsmoothlora.exports.export import export as export
    from fedsmoothlora.exports.generation import generate as generate
    from fedsmoothlora.exports.loading import load_adapter as load_adapter
    from fedsmoothlora.federation.records import RoundRecord as RoundRecord
    from fedsmoothlora.federation.settings import EvaluationSettings as EvaluationSettings
    from fedsmoothlora.federation.settings import MachineSettings as MachineSettings
    from fedsmoothlora.federation.settings import ParticipationSettings as ParticipationSettings
    from fedsmoothlora.federation.settings import PrivacySettings as PrivacySettings
    from fedsmoothlora.federation.settings import ServerSettings as ServerSettings
    from fedsmoothlora.federation.settings import TransportSettings as TransportSettings
    from fedsmoothlora.federation.settings import UploadSettings as UploadSettings
    from fedsmoothlora.methods.base import Method as Method
    from fedsmoothlora.modeling.settings import LoraSettings as LoraSettings
    from fedsmoothlora.modeling.settings import ModelSettings as ModelSettings
    from fedsmoothlora.runs.federation import Federation as Federation
    from fedsmoothlora.runs.live_curves import LiveCurves as LiveCurves
    from fedsmoothlora.runs.result import Result as Result
    from fedsmoothlora.runs.session import run as run
    from fedsmoothlora.tasks.base import Task as Task
    from fedsmoothlora.tasks.objectives.base import Objective as Objective
    from fedsmoothlora.training.settings import TrainingSettings as TrainingSettings

# PEFT imports bitsandbytes where it is installed. Its warning of a missing kernel belongs into logs only.
logging.getLogger("bitsandbytes").addHandler(logging.NullHandler())

__version__ = "0.1.0"

# The module of every public name.
_MODULES = {
    "AttackSuite": "experiments.attack_suite.suite",
    "Callback": "callbacks",
    "CheckpointSettings": "config.settings",
    "Comparison": "experiments.compare",
    "Config": "config.model",
    "ConfigError": "errors",
    "DataError": "errors",
    "DataSettings": "data.settings",
    "EarlyStopping": "callbacks",
    "EvaluationSettings": "federation.settings",
    "FedSmoothLoRAError": "errors",
    "Federation": "runs.federation",
    "FlowerSettings": "config.settings",
    "LiveCurves": "runs.live_curves",
    "LoraSettings": "modeling.settings",
    "LowRank": "algebra.lowrank",
    "MachineSettings": "federation.settings",
    "Method": "methods.base",
    "MetricError": "errors",
    "ModelSettings": "modeling.settings",
    "Objective": "tasks.objectives.base",
    "ParticipationSettings": "federation.settings",
    "PrivacySettings": "federation.settings",
    "Result": "runs.result",
    "RoundRecord": "federation.records",
    "RunInfo": "callbacks",
    "ServerSettings": "federation.settings",
    "Task": "tasks.base",
    "TrackingSettings": "config.settings",
    "TrainingSettings": "training.settings",
    "TransportSettings": "federation.settings",
    "Tuned": "experiments.tuning",
    "UploadSettings": "federation.settings",
    "attack": "experiments.attack_suite.suite",
    "compare": "experiments.compare",
    "export": "exports.export",
    "generate": "exports.generation",
    "load_adapter": "exports.loading",
    "run": "runs.session",
    "tune": "experiments.tuning",
}

__all__ = [
    "AttackSuite",
    "Callback",
    "CheckpointSettings",
    "Comparison",
    "Config",
    "ConfigError",
    "DataError",
    "DataSettings",
    "EarlyStopping",
    "EvaluationSettings",
    "FedSmoothLoRAError",
    "Federation",
    "FlowerSettings",
    "LiveCurves",
    "LoraSettings",
    "LowRank",
    "MachineSettings",
    "Method",
    "MetricError",
    "ModelSettings",
    "Objective",
    "ParticipationSettings",
    "PrivacySettings",
    "Result",
    "RoundRecord",
    "RunInfo",
    "ServerSettings",
    "Task",
    "TrackingSettings",
    "TrainingSettings",
    "TransportSettings",
    "Tuned",
    "UploadSettings",
    "__version__",
    "attack",
    "compare",
    "export",
    "generate",
    "load_adapter",
    "run",
    "tune",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'fedsmoothlora' has no attribute {name!r}")
    return getattr(import_module(f"fedsmoothlora.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
