"""A configuration as one frozen object: sections, each a frozen dataclass of its keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from annotated_types import Ge
from pydantic import PlainValidator

from fedsmoothlora.config.choices import PARTITION, TASK, checked_method
from fedsmoothlora.config.settings import CheckpointSettings, FlowerSettings, TrackingSettings
from fedsmoothlora.data.partitioning import Partitioning
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.federation.settings import (
    EvaluationSettings,
    MachineSettings,
    ParticipationSettings,
    PersonalSettings,
    PrivacySettings,
    ServerSettings,
    TransportSettings,
    UploadSettings,
)
from fedsmoothlora.methods import Method
from fedsmoothlora.modeling.settings import LoraSettings, ModelSettings
from fedsmoothlora.tasks import Task
from fedsmoothlora.training.settings import TrainingSettings

DEFAULT_METHOD = "fedsmoothlora"
DEFAULT_CLIENTS = 5

MethodSection = Annotated[Method, PlainValidator(checked_method)]
PartitionSection = Annotated[Partitioning, PlainValidator(PARTITION.checked)]
TaskSection = Annotated[Task, PlainValidator(TASK.checked)]


@dataclass(frozen=True, kw_only=True)
class Sections:
    """The sections of every federation, also of one whose model and data come from Python.

    Attributes:
        seed: seed of everything that is drawn at random.
        lora: the LoRA adapters: rank, scale and adapted layers.
        method: the federated method and its options.
        training: a client's local training, and the number of rounds.
        server: the aggregation of uploads, and the server's optimiser.
        participation: the clients that take part in a round.
        transport: the number format in which factors are sent.
        uploads: the checks of uploads.
        privacy: differential privacy of the released models, and secure aggregation.
        personal: personal models of the clients beside the global one.
        evaluation: the evaluation of models.
        checkpoint: the checkpoints that are kept.
        machine: threads, processes and device.
    """

    seed: Annotated[int, Ge(0)] = 0
    lora: LoraSettings = field(default_factory=LoraSettings)
    method: MethodSection = field(default_factory=lambda: checked_method({"name": DEFAULT_METHOD}))
    training: TrainingSettings = field(default_factory=TrainingSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    participation: ParticipationSettings = field(default_factory=ParticipationSettings)
    transport: TransportSettings = field(default_factory=TransportSettings)
    uploads: UploadSettings = field(default_factory=UploadSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    personal: PersonalSettings = field(default_factory=PersonalSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    machine: MachineSettings = field(default_factory=MachineSettings)


@dataclass(frozen=True, kw_only=True)
class Config(Sections):
    """A whole run: everything that decides its result.

    Attributes:
        name: name of the run.
        description: one sentence about the run.
        model: the pretrained model.
        data: the training and test data.
        task: the task, and its own keys.
        partition: the division of the training rows among clients.
        tracking: TensorBoard, Weights & Biases, MLflow and trackio.
        flower: federations on several machines.
    """

    name: str
    description: str = ""
    model: ModelSettings
    data: DataSettings
    task: TaskSection = field(default_factory=lambda: TASK.checked({}))
    partition: PartitionSection = field(
        default_factory=lambda: PARTITION.checked({"clients": DEFAULT_CLIENTS})
    )
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    flower: FlowerSettings = field(default_factory=FlowerSettings)
