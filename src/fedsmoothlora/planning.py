"""From a configuration to a simulation: everything is checked before any work is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from fedsmoothlora.adapters import AdaptedModel, find_layers
from fedsmoothlora.client import Learner
from fedsmoothlora.config import Config, ConfigError
from fedsmoothlora.data.client_rows import partition_notes, split_validation
from fedsmoothlora.data.examples import Subset
from fedsmoothlora.data.partitions import PARTITIONS, Partition, by_column, by_file, label_counts
from fedsmoothlora.data.raw import LabelledRows
from fedsmoothlora.data.sources import Data
from fedsmoothlora.data.texts import UNLABELLED
from fedsmoothlora.kinds import KINDS, Kind
from fedsmoothlora.methods import Layer
from fedsmoothlora.origin import Origin
from fedsmoothlora.rounds import Simulation
from fedsmoothlora.seeds import seed_for
from fedsmoothlora.server import Server

_BY_LABEL = ("dirichlet", "shards", "pathological")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a run before its model's weights are loaded.

    Attributes:
        config: the configuration.
        kind: what is particular to the kind of task, with the data.
        partition: which client has which rows of the training set, those for validation included.
        validation: the rows of them that each client keeps for validation.
        layers: the adapted layers.
        head: names of the head's modules.
        notes: what people should know of the data.
    """

    config: Config
    kind: Kind
    partition: Partition
    validation: Mapping[str, NDArray[np.int64]]
    layers: Mapping[str, Layer]
    head: tuple[str, ...]
    notes: Sequence[str] = ()

    @property
    def train(self) -> LabelledRows:
        """The training rows."""
        return self.kind.data.train

    @property
    def test(self) -> LabelledRows | None:
        """The test rows, if there is a test set."""
        return self.kind.data.test

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, in the labels' order."""
        return self.kind.data.classes

    @property
    def head_is_trained_whole(self) -> bool:
        """Whether the head is trained and averaged as it is, rather than through LoRA."""
        return self.config.model.head == "full"

    def training_rows(self, client: str) -> NDArray[np.int64]:
        """A client's rows, without those for validation."""
        rows = self.partition.clients[client]
        kept = self.validation.get(client)
        return rows if kept is None else np.setdiff1d(rows, kept)

    def partition_table(self) -> dict[str, Any]:
        """Rows of each class at each client, as plain JSON values."""
        counts = label_counts(self.partition, self.train.labels, len(self.classes))
        return {
            "classes": list(self.classes),
            "clients": dict(zip(self.partition.clients, counts.tolist(), strict=True)),
            "left_out": len(self.partition.left_out),
        }


def plan(config: Config) -> Plan:
    """Load the data, split it, and lay out the layers; no weights are loaded and nothing is trained.

    Raises:
        ConfigError: something cannot be right; the message names the key.
        PackageError: a package that ships the model or the data cannot be had.
    """
    try:
        kind = KINDS[config.task.kind](
            config.model, config.data, config.task, config.seed, config.partition.column
        )
        data = kind.data
        labels = data.train.labels
        partition = _partition(config, data)
        _check_sizes(partition)
        config.participation.check(len(partition.clients), config.uploads.min_clients)
        validation = {
            client: split_validation(rows, labels, config.data.validation, config.seed, client)[1]
            for client, rows in partition.clients.items()
            if config.data.validation
        }
        validation = {client: rows for client, rows in validation.items() if len(rows)}
        _check_evaluation(config, data, validation)
        empty = kind.load(empty=True)
        layers = find_layers(
            empty.model, config.lora, empty.head, head_is_trained_whole=config.model.head == "full"
        )
        if layers:
            partial = config.participation.count(len(partition.clients)) < len(partition.clients)
            config.method.check(layers, partial=partial)
    except ValueError as error:
        raise ConfigError(f"{config.name}: {error}") from None
    return Plan(
        config=config,
        kind=kind,
        partition=partition,
        validation=validation,
        layers=layers,
        head=empty.head,
        notes=[*kind.notes(), *partition_notes(partition, labels, data.classes)],
    )


def _partition(config: Config, data: Data[Any]) -> Partition:
    settings = config.partition
    if settings.kind == "by_column":
        assert data.client_of_row is not None
        assert settings.column is not None
        return by_column(data.client_of_row, settings.column)
    if settings.kind == "by_file":
        if data.file_of_row is None:
            raise ValueError(
                f"partition.kind = 'by_file': data.source = {config.data.source!r} does not come in one file "
                "or folder a client"
            )
        return by_file(data.file_of_row)
    if settings.kind in _BY_LABEL and data.classes == UNLABELLED:
        raise ValueError(
            f"partition.kind = {settings.kind!r} deals rows by their label: set data.label_column, or deal "
            "otherwise"
        )
    deal = PARTITIONS[settings.kind]
    return deal(data.train.labels, seed=seed_for(config.seed, "partition"), **settings.options())


def _check_sizes(partition: Partition) -> None:
    empty = [client for client, rows in partition.clients.items() if not len(rows)]
    if empty:
        raise ValueError(f"clients without any rows: {', '.join(empty[:10])}; a client needs at least one")


def _check_evaluation(config: Config, data: Data[Any], validation: Mapping[str, Any]) -> None:
    if data.test is None and not validation:
        raise ValueError(
            f"there is nothing to evaluate on: {config.data.source} has no test set; give one (data.test, "
            "data.test_split), or keep a share of every client's rows (data.validation = 0.1)"
        )
    if config.evaluation.clients and not validation:
        raise ValueError(
            "evaluation.clients = true: clients' own models are measured on their validation rows; "
            "set data.validation, for instance to 0.1"
        )


def build(planned: Plan) -> Simulation:
    """Load the model and bring clients and server together, ready for round 0."""
    config = planned.config
    kind = planned.kind
    loaded = kind.load()
    accelerator = Accelerator(cpu=config.machine.device == "cpu")
    model = AdaptedModel(
        loaded.model.to(accelerator.device),
        config.lora,
        head=loaded.head,
        head_is_trained_whole=planned.head_is_trained_whole,
    )
    origin = Origin(model.layers, config.seed, model.backbone.pretrained, model.head())
    return Simulation(
        server=Server(
            method=config.method,
            layers=model.layers,
            origin=origin,
            rounds=config.training.rounds,
            head=model.head(),
        ),
        learner=Learner(
            model=model,
            method=config.method,
            task=kind.task(loaded),
            training=config.training,
            accelerator=accelerator,
            origin=origin,
        ),
        clients={
            client: Subset(kind.train, planned.training_rows(client)) for client in planned.partition.clients
        },
        test=kind.test,
        measurement=kind.measurement(_rows_to_measure(planned), config.evaluation.batch_size),
        validation={client: Subset(kind.train, rows) for client, rows in planned.validation.items()},
        evaluation_batch_size=config.evaluation.batch_size,
        evaluate_clients=config.evaluation.clients,
        participation=config.participation,
        uploads=config.uploads,
    )


def _rows_to_measure(planned: Plan) -> LabelledRows:
    """The test rows; without a test set, the clients' validation rows."""
    if planned.test is not None:
        return planned.test
    return planned.train.take(np.sort(np.concatenate(list(planned.validation.values()))))
