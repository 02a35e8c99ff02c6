"""From a configuration to a simulation, with all checks before training begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from fedsmoothlora.algebra.seeds import seed_for
from fedsmoothlora.config import Config, absolute_paths
from fedsmoothlora.config.consistency import personal_reason
from fedsmoothlora.config.settings import CheckpointSettings
from fedsmoothlora.data.client_rows import partition_notes, split_validation
from fedsmoothlora.data.examples import Subset
from fedsmoothlora.data.loading import Data
from fedsmoothlora.data.partitioning import Rows
from fedsmoothlora.data.partitions import Partition, label_counts
from fedsmoothlora.data.raw import LabelledRows
from fedsmoothlora.data.texts import UNLABELLED
from fedsmoothlora.errors import ConfigError, DataError, MethodError, PrecisionError
from fedsmoothlora.federation.assembly import Participants, RunContext, assemble
from fedsmoothlora.federation.devices import check_device, device_notes
from fedsmoothlora.federation.engines import processes
from fedsmoothlora.federation.simulation import Engine, Simulation
from fedsmoothlora.methods import Layer
from fedsmoothlora.modeling.adapters import (
    AdaptedModel,
    check_not_shared,
    client_ranks,
    find_layers,
    on_device,
)
from fedsmoothlora.modeling.roles import resolve_roles
from fedsmoothlora.modeling.settings import LoraSettings
from fedsmoothlora.reports.metrics import OVER_CLIENTS, QUALITY
from fedsmoothlora.runs import privacy_lines
from fedsmoothlora.storage.arrivals import check_replay
from fedsmoothlora.tasks import ReadRequest, TaskData
from fedsmoothlora.tasks.base import Loaded, NeedsPretrained
from fedsmoothlora.tasks.metrics.base import Measurement
from fedsmoothlora.tasks.objectives.base import LacksMetrics, Objective
from fedsmoothlora.tasks.objectives.class_weights import check_names
from fedsmoothlora.training.devices import accelerator_for
from fedsmoothlora.training.loop import to_device


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run before its model's weights are loaded.

    Attributes:
        config: the configuration, with absolute paths, and names of layers in place of roles.
        task_data: the data of the run, as its task reads them.
        partition: the rows of the training set by client, including those for validation.
        validation: the rows that each client keeps for validation.
        layers: the adapted layers.
        head: names of the head's modules.
        ranks: LoRA ranks by client, if they differ.
        notes: warnings for the user about machine and data.
    """

    config: Config
    task_data: TaskData
    partition: Partition
    validation: Mapping[str, NDArray[np.int64]]
    layers: Mapping[str, Layer]
    head: tuple[str, ...]
    ranks: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def train(self) -> LabelledRows:
        """The training rows."""
        return self.task_data.data.train

    @property
    def test(self) -> LabelledRows | None:
        """The test rows, if there is a test set and the global model is evaluated on it."""
        return self.task_data.data.test if self.config.evaluation.test else None

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, in the labels' order."""
        return self.task_data.data.classes

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the model's outputs; the classes, if each row has one."""
        return self.task_data.data.outputs

    @property
    def head_is_trained_whole(self) -> bool:
        """Whether all weights of the head are trained and averaged; otherwise only its LoRA is."""
        return self.config.model.head == "full"

    @property
    def lora(self) -> LoraSettings:
        """``[lora]`` with the scale that the number of clients gives."""
        return _lora(self.config, self.partition)

    def check_metric(self, name: str, key: str, *, known_only: bool = False) -> None:
        """Raise ``ConfigError`` for a metric of a task that the global model does not have on these data.

        Args:
            name: the metric's name.
            key: the option that names it.
            known_only: refuse all names but these metrics and their summaries over clients. Otherwise
                metrics that no task of the package has are not refused: a callback may record them.
        """
        lacks = _lacks(self.config, self.task_data, self.task_data.load(empty=True), self.validation)
        measured = [one for one in self.config.task.measured if not lacks(one)]
        of = next((name.removesuffix(end) for end in OVER_CLIENTS if name.endswith(end)), name)
        if (name in QUALITY and name not in measured) or (known_only and of not in measured):
            raise ConfigError(
                f"{key} {name}: is not measured by task.kind = {self.config.task.kind!r} on these data; "
                f"choose one of {', '.join(measured)}"
            )

    @property
    def known_rows(self) -> dict[str, int | None]:
        """The number of rows of every client; None if its site holds them."""
        return _known_rows(self.partition)

    def training_rows(self, client: str) -> NDArray[np.int64]:
        """The rows that a client trains on: all of its rows but those for validation."""
        rows = self.partition.clients[client]
        kept = self.validation.get(client)
        return rows if kept is None else np.setdiff1d(rows, kept)

    @property
    def rows_at_once(self) -> int:
        """The number of the longest rows in one forward and backward pass of training."""
        training = self.config.training
        if training.tokens_per_batch is None:
            return -(-training.batch_size // training.accumulation)
        tokens = self.task_data.widest_batch(1)["input_ids"].numel()
        return min(training.batch_size, max(1, training.tokens_per_batch // tokens))

    def partition_table(self) -> dict[str, Any]:
        """Rows of each class at each client, as plain JSON values."""
        counts = label_counts(self.partition, self.train.labels, len(self.classes))
        max_value, outputs, form = self.task_data.data.max_value, self.outputs, self.task_data.data.form
        return {
            "classes": list(self.classes),
            **({} if outputs == self.classes else {"outputs": list(outputs)}),
            "clients": dict(zip(self.partition.clients, counts.tolist(), strict=True)),
            "left_out": len(self.partition.left_out),
            **({} if max_value is None else {"max_value": max_value}),
            **({} if form is None else {"form": form}),
        }


def plan(config: Config, *, site: str | None = None, sites: Sequence[str] = ()) -> Plan:
    """Load the data, split them, and find the layers. No weights are loaded and nothing is trained.

    Args:
        config: the configuration.
        site: the client to which all data belong; ``[partition]`` is not used.
        sites: the clients, if they hold the data themselves, so that no training rows are loaded here.

    Raises:
        ConfigError: a value or the data are not valid; the message names the key or the file.
        PackageError: a package that contains the model or the data cannot be fetched or read.
    """
    config = absolute_paths(config)  # what is written must not depend on the current folder
    machine = config.machine
    try:
        check_device(machine)
        processes.check(machine.jobs, machine.device)
        task_data = config.task.read(
            ReadRequest(
                model=config.model,
                data=config.data,
                seed=config.seed,
                client_column=config.partition.client_column if site is None and not sites else None,
                elsewhere=bool(sites),
            )
        )
        data = task_data.data
        if config.training.class_weights is not None:
            check_names(config.training.class_weights, data.outputs, known=data.outputs)
        if (site is not None or sites or config.privacy.uploads_only) and data.max_value is not None:
            raise ConfigError(
                "data.max_value is missing: there are images of more than 8 bits a pixel, here with values "
                f"up to {data.max_value}, and all sites must scale them alike"
            )
        partition = _dealt(config, data, site, sites)
        labels = data.train.labels
        if site is None:
            config.participation.check(len(partition.clients), config.uploads.min_clients)
            config.participation.check_speeds(list(partition.clients))
            check_replay(config.participation, partition.clients, config.training.rounds)
            config.server.check(config.participation.merged(len(partition.clients)))
            privacy_lines.check_privacy(config, _known_rows(partition))
        validation = {
            client: split_validation(rows, labels, config.data.validation, config.seed, client)[1]
            for client, rows in partition.clients.items()
            if config.data.validation
        }
        validation = {client: rows for client, rows in validation.items() if len(rows)}
        if site is None:
            _check_evaluation(config, data, validation or (sites and config.data.validation))
        empty = task_data.load(empty=True)
        config = replace(config, lora=resolve_roles(empty.model, config.lora, empty.head))
        lora, whole = _lora(config, partition), config.model.head == "full"
        layers = find_layers(empty.model, lora, empty.head, head_is_trained_whole=whole)
        config.task.check_layers(list(layers), empty.head)
        if (most := config.training.tokens_per_batch) and "input_ids" not in task_data.widest_batch(1):
            raise ConfigError(
                f"training.tokens_per_batch = {most}: the model gets no tokens from the rows of task.kind = "
                f"{config.task.kind!r} as they are set up here; use training.accumulation"
            )
        check_not_shared(empty.model, layers)
        if layers:
            partial = config.participation.partial(len(partition.clients))
            config.method.check(layers, partial=partial)
        ranks = _ranks(config, partition, validation, apart=site is not None or bool(sites))
        if site is None:  # otherwise the coordinator decides
            _check_best(config, _lacks(config, task_data, empty, {} if sites else validation))
    except (ConfigError, DataError, MethodError, PrecisionError) as error:
        raise ConfigError(f"{config.name}: {error}") from None
    return Plan(
        config=config,
        task_data=task_data,
        partition=partition,
        validation=validation,
        layers=layers,
        head=empty.head,
        ranks=ranks,
        notes=[
            *processes.notes(machine.jobs, machine.threads),
            *device_notes(machine),
            *privacy_lines.warnings(config),
            *task_data.notes(),
            *empty.notes,
            *([] if sites else partition_notes(partition, labels, data.classes)),
            *_max_weight_notes(config, len(partition.clients)),
        ],
    )


def _known_rows(partition: Partition) -> dict[str, int | None]:
    """The number of training rows of every client; None if its site holds them."""
    return {client: len(rows) or None for client, rows in partition.clients.items()}


def _max_weight_notes(config: Config, clients: int) -> list[str]:
    """A note if ``uploads.max_weight`` cannot limit anything: the excess of one of two goes to the other."""
    in_a_round = config.participation.merged(len(config.flower.clients) or clients)
    if config.uploads.max_weight is None or in_a_round > 2:
        return []
    return [
        f"uploads.max_weight = {config.uploads.max_weight:g} does nothing: {in_a_round} clients take part in "
        "a round, and a cap needs three to share the excess"
    ]


def _lora(config: Config, partition: Partition) -> LoraSettings:
    """``[lora]`` with the scale that the number of clients gives."""
    clients = len(config.flower.clients or partition.clients)
    return config.lora.for_clients(config.participation.merged(clients))


def _ranks(
    config: Config, partition: Partition, validation: Mapping[str, Any], *, apart: bool
) -> dict[str, int]:
    """Clients' LoRA ranks, if they differ. ``apart``: sites hold the data, so not all sizes are known."""
    if apart and config.lora.client_ranks == "by_size":
        raise ConfigError(
            "lora.client_ranks = 'by_size': where sites hold the data, nobody knows all sizes; list the ranks"
        )
    rows = {c: len(rows) - len(validation.get(c, ())) for c, rows in partition.clients.items()}
    return client_ranks(
        config.lora, config.method, dict.fromkeys(config.flower.clients, 1) if apart else rows
    )


def _dealt(config: Config, data: Data[Any], site: str | None, sites: Sequence[str]) -> Partition:
    """Deal the rows to the clients."""
    if site is None and not sites:
        rows = Rows(
            labels=data.train.labels,
            labelled=data.classes != UNLABELLED,
            client_of_row=data.client_of_row,
            file_of_row=data.file_of_row,
            source=config.data.source,
        )
        partition = config.partition.deal(rows, seed_for(config.seed, "partition"))
        _check_sizes(partition)
        return partition
    every = np.arange(len(data.train), dtype=np.int64)
    return Partition(dict.fromkeys([site] if site is not None else sites, every), every[:0])


def _check_sizes(partition: Partition) -> None:
    empty = [client for client, rows in partition.clients.items() if not len(rows)]
    if empty:
        raise ConfigError(f"clients without any rows: {', '.join(empty[:10])}; a client needs at least one")


def _check_evaluation(config: Config, data: Data[Any], validation: object) -> None:
    if (data.test is None or not config.evaluation.test) and not validation:
        why = f"{config.data.source} has no test set; give one (data.test, data.test_split), or"
        if config.privacy.uploads_only:
            raise ConfigError(
                f"there is nothing to evaluate on: with {config.privacy.key} no metric "
                f"leaves a client, and {config.data.source} has no test set; give one (data.test, "
                "data.test_split)"
            )
        if not config.evaluation.test:
            why = "evaluation.test = false, so"
        raise ConfigError(
            f"there is nothing to evaluate on: {why} keep a share of every client's rows "
            "(data.validation = 0.1)"
        )
    if (reason := personal_reason(config)) and not validation:
        raise ConfigError(
            f"{reason}: personal models are measured on the clients' validation rows; set data.validation, "
            "for instance to 0.1"
        )
    if config.evaluation.clients and not validation:
        raise ConfigError(
            "evaluation.clients = true: clients' own models are measured on their validation rows; "
            "set data.validation, for instance to 0.1"
        )


def _lacks(
    config: Config, task_data: TaskData, empty: Loaded, validation: Mapping[str, NDArray[np.int64]]
) -> Callable[[str], bool]:
    """A function that tells whether the global model lacks a metric on the rows that it is evaluated on.

    Without a test set, a metric is a mean over the clients that have it. ``validation`` is empty if sites
    hold these rows.
    """
    objective = task_data.objective(empty)

    def lacks(metric: str) -> bool:
        if not isinstance(objective, LacksMetrics):
            return False
        if task_data.data.test is not None and config.evaluation.test:
            return objective.lacks(metric, lambda: getattr(task_data.test, "labels", None))
        if not validation:
            return objective.lacks(metric, lambda: None)
        return all(
            objective.lacks(metric, lambda rows=rows: Subset(task_data.train, rows).labels)  # type: ignore[misc]
            for rows in validation.values()
        )

    return lacks


def _check_best(config: Config, lacks: Callable[[str], bool]) -> None:
    """Refuse a ``checkpoint.best`` that the global model lacks.

    A default that decides nothing is not refused, such as ``entity_f1`` of tags that do not mark entities.
    """
    best, patience = config.checkpoint.best, config.training.patience
    chosen = best != config.task.defaults.get("checkpoint.best", CheckpointSettings().best)
    if (chosen or patience is not None) and lacks(best):
        follows = "" if patience is None else f", which training.patience = {patience} follows"
        raise ConfigError(
            f"checkpoint.best = {best!r}{follows}: these data do not have this metric; set checkpoint.best "
            f"to one of {', '.join(name for name in config.task.measured if not lacks(name))}"
        )


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A plan's model with its weights.

    Attributes:
        adapted: the adapted model, on the accelerator's device.
        objective: loss and evaluation.
        accelerator: the device that clients train on.
    """

    adapted: AdaptedModel
    objective: Objective
    accelerator: Accelerator


def load(planned: Plan, accelerator: Accelerator | None = None) -> LoadedModel:
    """Load the model's weights and adapt it.

    Args:
        planned: the plan.
        accelerator: the device; that of ``machine.device`` unless given.
    """
    config = planned.config
    loaded = planned.task_data.load()
    accelerator = accelerator or accelerator_for(config.machine.device)
    adapted = AdaptedModel(
        on_device(loaded.model, accelerator.device),
        planned.lora,
        head=loaded.head,
        head_is_trained_whole=planned.head_is_trained_whole,
        ranks=set(planned.ranks.values()),
        keep_weights=config.machine.keep_weights,
        compile=config.machine.compile,
    )
    return LoadedModel(
        adapted=adapted, objective=planned.task_data.objective(loaded), accelerator=accelerator
    )


def build(
    planned: Plan,
    context: RunContext | None = None,
    *,
    loaded: LoadedModel | None = None,
    participants: Participants | None = None,
    engine: Engine | None = None,
) -> Simulation:
    """Build the planned federation, ready for round 0.

    Args:
        planned: the plan.
        context: the run; all state is in memory unless given.
        loaded: the model, which is modified; loaded here unless given.
        participants: the clients and the test rows; those of the plan unless given.
        engine: the engine that runs the clients; ``machine.jobs`` at a time on this machine unless given.
    """
    loaded = loaded or load(planned)
    accelerator = loaded.accelerator
    if isinstance(planned.task_data, NeedsPretrained):
        with loaded.adapted.without_lora():
            planned.task_data.prepare(loaded.adapted.model, lambda batch: to_device(batch, accelerator))
    return assemble(
        planned.config,
        loaded.adapted,
        loaded.objective,
        participants or participants_of(planned),
        accelerator=accelerator,
        engine=engine,
        context=context,
    )


def participants_of(planned: Plan) -> Participants:
    """The clients of the plan, with their rows as the model's inputs."""
    train = planned.task_data.train
    return Participants(
        clients={
            client: Subset(train, planned.training_rows(client)) for client in planned.partition.clients
        },
        validation={client: Subset(train, rows) for client, rows in planned.validation.items()},
        test=None if planned.test is None else planned.task_data.test,
        measurement=measurement(planned),
        ranks=planned.ranks,
    )


def measurement(planned: Plan) -> Measurement | None:
    """The costly metric on the test rows, or without a test set, on the clients' validation rows."""
    batch_size = planned.config.evaluation.batch_size
    if planned.test is not None:
        return planned.task_data.measurement(planned.test, batch_size)
    if not planned.validation:
        return None
    rows = np.sort(np.concatenate(list(planned.validation.values())))
    return planned.task_data.measurement(planned.train.take(rows), batch_size)
