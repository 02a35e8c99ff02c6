"""Build a federation from server, clients and engine.

The command line, the Python API, Flower's coordinator and sites, the check, exports and the methods table all
use this module, so a federation is built in one place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from accelerate import Accelerator
from torch import Tensor

from fedsmoothlora.data.examples import Examples, labels_of
from fedsmoothlora.errors import ConfigError, DataError
from fedsmoothlora.federation.accounting import Budget, Ledger, MemoryLedger
from fedsmoothlora.federation.aggregation import Aggregation
from fedsmoothlora.federation.arrivals import Arrivals, MemoryArrivals, RoundArrivals
from fedsmoothlora.federation.client import Learner
from fedsmoothlora.federation.engines import processes
from fedsmoothlora.federation.engines.batched import Batched
from fedsmoothlora.federation.initial_state import InitialState
from fedsmoothlora.federation.noise import Noise
from fedsmoothlora.federation.privacy import PrivateMean
from fedsmoothlora.federation.server import Server
from fedsmoothlora.federation.server_optimizers import ServerOptimizer
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
from fedsmoothlora.federation.simulation import (
    ClientStates,
    Engine,
    MemoryStates,
    MemorySums,
    NoReplies,
    Replies,
    Simulation,
    Sums,
)
from fedsmoothlora.federation.transport import Transport
from fedsmoothlora.methods import Coded, Layer, Method
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.modeling.backbone import MergedBackbone
from fedsmoothlora.modeling.settings import LoraSettings
from fedsmoothlora.tasks.metrics import Measurement
from fedsmoothlora.tasks.objectives import Objective
from fedsmoothlora.tasks.objectives.base import RowLosses
from fedsmoothlora.tasks.objectives.class_weights import WeighsClasses
from fedsmoothlora.training.settings import TrainingSettings


class Sections(Protocol):
    """The sections of a configuration that a federation is built from."""

    @property
    def seed(self) -> int: ...
    @property
    def lora(self) -> LoraSettings: ...
    @property
    def method(self) -> Method: ...
    @property
    def training(self) -> TrainingSettings: ...
    @property
    def server(self) -> ServerSettings: ...
    @property
    def participation(self) -> ParticipationSettings: ...
    @property
    def transport(self) -> TransportSettings: ...
    @property
    def uploads(self) -> UploadSettings: ...
    @property
    def privacy(self) -> PrivacySettings: ...
    @property
    def personal(self) -> PersonalSettings: ...
    @property
    def evaluation(self) -> EvaluationSettings: ...
    @property
    def machine(self) -> MachineSettings: ...


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Identity and storage of the run that a federation belongs to. By default, all state is in memory.

    Attributes:
        experiment: the run's identity.
        states: storage of the clients' states between rounds.
        replies: storage of the replies of the round in progress.
        sums: storage of the sums of masked uploads.
        arrivals: the record of arrivals in asynchronous rounds.
        replayed: the recorded rounds of ``participation.replay``; None without one.
        updates: the server updates, in order.
        ledger: the private releases.
        should_stop: called between clients; True ends the run.
    """

    experiment: str = ""
    states: ClientStates = field(default_factory=MemoryStates)
    replies: Replies = field(default_factory=NoReplies)
    sums: Sums = field(default_factory=MemorySums)
    arrivals: Arrivals = field(default_factory=MemoryArrivals)
    replayed: Sequence[RoundArrivals] | None = None
    updates: MutableSequence[Coded] = field(default_factory=list)
    ledger: Ledger = field(default_factory=MemoryLedger)
    should_stop: Callable[[], bool] = lambda: False


@dataclass(frozen=True, kw_only=True)
class Participants:
    """The clients of a federation, and the rows on which the global model is evaluated.

    Attributes:
        clients: each client's training rows, by id.
        validation: each client's validation rows, by id.
        test: the global test set, if there is one.
        measurement: a costly metric of the global model, if one is configured.
        ranks: LoRA ranks by client, if they differ.
    """

    clients: Mapping[str, Examples]
    validation: Mapping[str, Examples] = field(default_factory=dict)
    test: Examples | None = None
    measurement: Measurement | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)


def assemble(
    sections: Sections,
    model: AdaptedModel,
    objective: Objective,
    participants: Participants,
    *,
    accelerator: Accelerator,
    engine: Engine | None = None,
    context: RunContext | None = None,
) -> Simulation:
    """Build a federation before its first round.

    Args:
        sections: the settings.
        model: the adapted model, on the accelerator's device.
        objective: loss and evaluation.
        participants: the clients and the test rows.
        accelerator: the device that clients train on.
        engine: runs the clients; that of ``[machine]`` unless given.
        context: identity and storage of the run; everything is kept in memory unless given.
    """
    check_class_weights(sections.training, objective, participants.clients)
    check_row_losses(sections.privacy, objective)
    check_batched_model(sections.machine, model)
    check_head_lr(sections.training, model)
    context = context or RunContext()
    head = model.head()
    initial = initial_state(sections, model.layers, model.backbone.pretrained, head)
    return Simulation(
        engine=engine or engine_of(sections.machine),
        server=build_server(sections, initial, population=len(participants.clients), context=context),
        learner=Learner(
            model=model,
            method=sections.method,
            objective=objective,
            training=sections.training,
            accelerator=accelerator,
            initial_state=initial,
            ranks=participants.ranks,
            transport=initial.transport,
            diagnoses=sections.evaluation.diagnostics,
            privacy=sections.privacy,
            personal=sections.personal,
        ),
        clients=participants.clients,
        test=participants.test,
        measurement=participants.measurement,
        validation=participants.validation,
        evaluation_batch_size=sections.evaluation.batch_size,
        evaluate_clients=sections.evaluation.clients,
        personal_steps=sections.evaluation.personal_steps,
        participation=sections.participation,
        uploads=_upload_checks(sections),
        states=context.states,
        arrivals=context.arrivals,
        replayed=context.replayed,
        replies=context.replies,
        sums=context.sums,
        should_stop=context.should_stop,
    )


def check_class_weights(
    training: TrainingSettings, objective: Objective, clients: Mapping[str, Examples]
) -> None:
    """Refuse class weights that the objective cannot use, or that do not fit the classes of a client."""
    if training.class_weights is None:
        return
    if not isinstance(objective, WeighsClasses):
        raise ConfigError(
            f"training.class_weights = {training.class_weights!r}: the objective "
            f"{type(objective).__name__} does not weigh classes; remove the key"
        )
    for client, rows in clients.items():
        try:
            objective.weighted(labels_of(rows), training.class_weights)
        except DataError as error:
            raise DataError(f"client {client}: {error}") from None


def check_row_losses(privacy: PrivacySettings, objective: Objective) -> None:
    """Refuse an objective that does not know the loss of a single row, with ``privacy.unit = "sample"``."""
    if privacy.hides_rows and not isinstance(objective, RowLosses):
        raise ConfigError(
            f"privacy.unit = 'sample': the objective {type(objective).__name__} has no losses(model, batch), "
            "which returns the loss of every row by itself"
        )


def check_batched_model(machine: MachineSettings, model: AdaptedModel) -> None:
    """Refuse models whose clients cannot be trained in one forward pass, with ``machine.batch_clients``."""
    if machine.batch_clients == 1:
        return
    key = f"machine.batch_clients = {machine.batch_clients}"
    if not isinstance(model.backbone, MergedBackbone):
        raise ConfigError(
            f"{key}: clients that train together would round sums in bfloat16 or quantised layers in another "
            "place than one after the other; it needs adapted layers in float32, so leave it at 1"
        )
    if shared := model.shared_head():
        raise ConfigError(
            f"{key}: the head is trained whole and shares {shared} with other layers, of which every client "
            "would need a copy of its own; leave it at 1, or set model.head = 'lora'"
        )


def check_head_lr(training: TrainingSettings, model: AdaptedModel) -> None:
    """Refuse ``training.head_lr`` without a head that is trained whole."""
    if training.head_lr is not None and not model.head_parameters():
        raise ConfigError(
            f"training.head_lr = {training.head_lr:g}: the model has no head that is trained whole; "
            "leave the key out"
        )


def engine_of(machine: MachineSettings) -> Engine:
    """The engine that runs clients on this machine."""
    return processes.engine(machine.jobs) if machine.batch_clients == 1 else Batched(machine.batch_clients)


def initial_state(
    sections: Sections,
    layers: Mapping[str, Layer],
    pretrained: Callable[[str], Tensor] | None = None,
    head: Mapping[str, Tensor] | None = None,
) -> InitialState:
    """The state that server and clients share before round 0.

    Args:
        sections: the settings.
        layers: the adapted layers, by name.
        pretrained: the pretrained weight of a layer, ``(m, n)``; without it, `Method.prepare` is not called.
        head: the parameters of a fully trained head.
    """
    return InitialState(
        layers,
        sections.seed,
        pretrained or _not_loaded,
        head or {},
        transport=Transport(sections.transport.bits),
        prepared={} if pretrained is None else sections.method.prepare(layers, pretrained),
    )


def build_server(
    sections: Sections, initial: InitialState, *, population: int = 0, context: RunContext | None = None
) -> Server:
    """Build the server before its first round.

    Args:
        sections: the settings.
        initial: the state that the server shares with the clients.
        population: the number of clients.
        context: identity and storage of the run; updates are kept in memory unless given.
    """
    context = context or RunContext()
    return Server(
        method=sections.method,
        layers=initial.layers,
        initial_state=initial,
        rounds=sections.training.rounds,
        head=dict(initial.head),
        experiment=context.experiment,
        updates=context.updates,
        aggregation=Aggregation(
            settings=sections.server,
            max_weight=sections.uploads.max_weight,
            factors_apart=sections.method.traits.averages_factors,
        ),
        private=_private_mean(sections, population, context.ledger),
        privacy=sections.privacy,
        optimizer=ServerOptimizer(settings=sections.server),
        transport=initial.transport,
        population=population,
        control={} if sections.training.scaffold else None,
        participation=sections.participation,
    )


def _private_mean(sections: Sections, population: int, ledger: Ledger) -> PrivateMean | None:
    """The rule of ``[privacy]``; None if it is off."""
    settings = sections.privacy
    if not settings.hides_clients:
        return None
    return PrivateMean(
        method=sections.method,
        clip_norm=settings.first_clip_norm,
        population=population,
        budget=budget(sections, ledger),
        noise=Noise(settings.seed),
    )


def _upload_checks(sections: Sections) -> UploadSettings:
    """``[uploads]``; with ``privacy.unit = "client"`` no upload is refused because of the others."""
    if not sections.privacy.hides_clients:
        return sections.uploads
    return replace(sections.uploads, max_norm_factor=math.inf)


def budget(sections: Sections, ledger: Ledger | None = None) -> Budget:
    """The privacy budget of a run with ``privacy.unit = "client"``.

    Args:
        sections: the settings.
        ledger: the releases so far; none unless given.
    """
    return Budget(
        settings=sections.privacy,
        sample_rate=sections.participation.sample_rate,
        rounds=sections.training.rounds,
        ledger=ledger or MemoryLedger(),
    )


def _not_loaded(name: str) -> Tensor:
    raise RuntimeError(f"the pretrained weight of layer {name} is not loaded here")
