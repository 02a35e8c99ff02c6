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
from fedsmoothlora.data.images import ImageExamples
from fedsmoothlora.data.partitions import PARTITIONS, Partition, by_column, by_file, label_counts
from fedsmoothlora.data.raw import LabelledImages
from fedsmoothlora.data.sources import ImageData, load_images, load_test_images
from fedsmoothlora.engines.in_process import InProcess
from fedsmoothlora.methods import Layer
from fedsmoothlora.models import check_image_size, load_image_classifier
from fedsmoothlora.origin import Origin
from fedsmoothlora.rounds import Simulation
from fedsmoothlora.seeds import seed_for
from fedsmoothlora.server import Server
from fedsmoothlora.tasks import Classification


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a run before its model's weights are loaded.

    Attributes:
        config: the configuration.
        train: training images.
        test: test images, if there is a test set.
        partition: which client has which rows of the training set, those for validation included.
        validation: the rows of them that each client keeps for validation.
        layers: the adapted layers.
        head: names of the head's modules.
        notes: what people should know of the data.
    """

    config: Config
    train: LabelledImages
    test: LabelledImages | None
    partition: Partition
    validation: Mapping[str, NDArray[np.int64]]
    layers: Mapping[str, Layer]
    head: tuple[str, ...]
    notes: Sequence[str] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, in the labels' order."""
        return self.train.classes

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


def plan(config: Config, *, site: str | None = None, sites: Sequence[str] = ()) -> Plan:
    """Load the data, split it, and lay out the layers; no weights are loaded and nothing is trained.

    Args:
        config: the configuration.
        site: the data are this client's alone, whatever ``[partition]`` says.
        sites: the clients, where they hold the data: no training rows are loaded here.

    Raises:
        ConfigError: something cannot be right; the message names the key.
        PackageError: a package that ships the model or the data cannot be had.
    """
    try:
        check_image_size(config.model)
        data, partition = _dealt(config, site, sites)
        labels = data.train.labels
        if site is None:
            config.participation.check(len(partition.clients), config.uploads.min_clients)
        validation = {
            client: split_validation(rows, labels, config.data.validation, config.seed, client)[1]
            for client, rows in partition.clients.items()
            if config.data.validation
        }
        validation = {client: rows for client, rows in validation.items() if len(rows)}
        if site is None:
            _check_evaluation(config, data, validation or (sites and config.data.validation))
        empty = load_image_classifier(config.model, data.classes, config.seed, empty=True)
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
        train=data.train,
        test=data.test,
        partition=partition,
        validation=validation,
        layers=layers,
        head=empty.head,
        notes=[*data.notes, *([] if sites else partition_notes(partition, labels, data.classes))],
    )


def _dealt(config: Config, site: str | None, sites: Sequence[str]) -> tuple[ImageData, Partition]:
    """The data, and who has which rows."""
    if site is None and not sites:
        data = load_images(config.data, config.seed, config.partition.column)
        partition = _partition(config, data)
        _check_sizes(partition)
        return data, partition
    data = load_test_images(config.data, config.seed) if sites else load_images(config.data, config.seed)
    rows = np.arange(len(data.train), dtype=np.int64)
    return data, Partition(dict.fromkeys([site] if site is not None else sites, rows), rows[:0])


def _partition(config: Config, data: ImageData) -> Partition:
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
    deal = PARTITIONS[settings.kind]
    return deal(data.train.labels, seed=seed_for(config.seed, "partition"), **settings.options())


def _check_sizes(partition: Partition) -> None:
    empty = [client for client, rows in partition.clients.items() if not len(rows)]
    if empty:
        raise ValueError(f"clients without any rows: {', '.join(empty[:10])}; a client needs at least one")


def _check_evaluation(config: Config, data: ImageData, validation: object) -> None:
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
    loaded = load_image_classifier(config.model, planned.classes, config.seed)
    accelerator = Accelerator(cpu=config.machine.device == "cpu")
    model = AdaptedModel(
        loaded.model.to(accelerator.device),
        config.lora,
        head=loaded.head,
        head_is_trained_whole=planned.head_is_trained_whole,
    )
    origin = Origin(model.layers, config.seed, model.backbone.pretrained, model.head())
    train = ImageExamples(planned.train, config.model.image_size, loaded.statistics)
    return Simulation(
        engine=InProcess(),
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
            task=Classification(loaded.arguments),
            training=config.training,
            accelerator=accelerator,
            origin=origin,
        ),
        clients={
            client: Subset(train, planned.training_rows(client)) for client in planned.partition.clients
        },
        test=None
        if planned.test is None
        else ImageExamples(planned.test, config.model.image_size, loaded.statistics),
        validation={client: Subset(train, rows) for client, rows in planned.validation.items()},
        evaluation_batch_size=config.evaluation.batch_size,
        evaluate_clients=config.evaluation.clients,
        participation=config.participation,
        uploads=config.uploads,
    )
