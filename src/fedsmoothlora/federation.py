"""From a configuration to a federation: everything is checked before any work is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from fedsmoothlora.adapters import AdaptedModel, find_layers
from fedsmoothlora.client import Learner
from fedsmoothlora.config import Config, ConfigError
from fedsmoothlora.data.examples import Subset
from fedsmoothlora.data.images import ImageExamples
from fedsmoothlora.data.partitions import PARTITIONS, Partition, label_counts
from fedsmoothlora.data.raw import RawImages
from fedsmoothlora.data.sources import load_images
from fedsmoothlora.methods import Layer
from fedsmoothlora.models import check_image_size, load_image_classifier
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
        test: test images.
        partition: which client has which rows.
        layers: the adapted layers.
        head: names of the head's modules.
    """

    config: Config
    train: RawImages
    test: RawImages
    partition: Partition
    layers: Mapping[str, Layer]
    head: tuple[str, ...]

    @property
    def head_is_trained_whole(self) -> bool:
        """Whether the head is trained and averaged as it is, rather than through LoRA."""
        return self.config.model.head == "full"

    def partition_table(self) -> dict[str, Any]:
        """Rows of each class at each client, as plain JSON values."""
        counts = label_counts(self.partition, self.train.labels, len(self.train.classes))
        return {
            "classes": list(self.train.classes),
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
        check_image_size(config.model)
        train, test = load_images(config.data, config.seed)
        settings = config.partition
        partition = PARTITIONS[settings.kind](
            train.labels,
            clients=settings.clients,
            seed=seed_for(config.seed, "partition"),
            **settings.options(),
        )
        empty = load_image_classifier(config.model, train.classes, config.seed, empty=True)
        layers = find_layers(
            empty.model, config.lora, empty.head, head_is_trained_whole=config.model.head == "full"
        )
        if layers:
            config.method.check(layers)
    except ValueError as error:
        raise ConfigError(f"{config.name}: {error}") from None
    return Plan(config=config, train=train, test=test, partition=partition, layers=layers, head=empty.head)


def build(planned: Plan) -> Simulation:
    """Load the model and bring clients and server together, ready for round 0."""
    config = planned.config
    loaded = load_image_classifier(config.model, planned.train.classes, config.seed)
    accelerator = Accelerator(cpu=config.machine.device == "cpu")
    model = AdaptedModel(
        loaded.model.to(accelerator.device),
        config.lora,
        head=loaded.head,
        head_is_trained_whole=planned.head_is_trained_whole,
    )
    train = ImageExamples(planned.train, config.model.image_size, loaded.statistics)
    return Simulation(
        server=Server(
            method=config.method,
            layers=model.layers,
            rounds=config.training.rounds,
            head=model.head(),
        ),
        learner=Learner(
            model=model,
            method=config.method,
            task=Classification(),
            training=config.training,
            accelerator=accelerator,
            seed=config.seed,
        ),
        clients={client: Subset(train, rows) for client, rows in planned.partition.clients.items()},
        test=ImageExamples(planned.test, config.model.image_size, loaded.statistics),
        evaluation_batch_size=config.evaluation.batch_size,
        evaluate_clients=config.evaluation.clients,
        participation=config.participation,
        uploads=config.uploads,
    )
