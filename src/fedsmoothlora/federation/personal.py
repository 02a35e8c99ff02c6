"""Personal models: a client's own LoRA and head beside the global model.

A personal model is kept as its deviation from the global model. With the global weight ``W^t`` of a layer at
the start of round ``t``, LoRA of the server included, the personal weight is ``V = W^t + s * B A``. The
deviation ``B A`` stays at the client. It keeps its meaning in every method with a global model, also where
rounds merge their update and restart. Where the global model moves, the personal one moves with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.seeds import seed_for
from fedsmoothlora.data.examples import Batch, BatchOrder, Examples
from fedsmoothlora.methods import Products, Update
from fedsmoothlora.modeling.adapters import AdaptedModel
from fedsmoothlora.training.corrections import Correction, towards
from fedsmoothlora.training.loop import Split, checkpointing, train
from fedsmoothlora.training.settings import TrainingSettings

# Before the names of a deviation in a client's state, and before those of its head within it.
_PERSONAL, _HEAD = "personal:", "head:"


@dataclass(frozen=True, kw_only=True)
class GlobalModel:
    """The global model as a client holds it: ``W^t + s * lora`` on the backbone ``W^t``, and its head."""

    lora: Products = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """The difference of a personal model from the global one; what is missing is 0.

    Attributes:
        lora: ``B A`` of each layer, without the scale ``s``.
        head: the difference of each parameter of a fully trained head.
    """

    lora: Products = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def kept_in(cls, kept: Update) -> Deviation:
        """The deviation in a client's state of one round."""
        own = {key.removeprefix(_PERSONAL): value for key, value in kept.items() if _is_personal(key)}
        return cls(
            lora={name: value for name, value in own.items() if isinstance(value, LowRank)},
            head={
                name.removeprefix(_HEAD): value
                for name, value in own.items()
                if not isinstance(value, LowRank)
            },
        )

    def kept(self) -> Update:
        """The deviation as a part of a client's state."""
        return {
            **{f"{_PERSONAL}{name}": product for name, product in self.lora.items()},
            **{f"{_PERSONAL}{_HEAD}{name}": value for name, value in self.head.items()},
        }

    def to(self, device: torch.device) -> Deviation:
        """The deviation on a device."""
        return Deviation(
            lora={name: product.to(device=device) for name, product in self.lora.items()},
            head={name: value.to(device) for name, value in self.head.items()},
        )


def without_personal(kept: Update) -> Update:
    """A client's state of one round without its personal model."""
    return {key: value for key, value in kept.items() if not _is_personal(key)}


def _is_personal(key: str) -> bool:
    return key.startswith(_PERSONAL)


@dataclass(frozen=True, kw_only=True)
class PersonalTraining:
    """Trains personal models; the optimiser and its settings are those of local training.

    Attributes:
        model: the model, whose backbone holds ``W^t``.
        loss: the mean loss of a batch, computed with ``model``.
        split: cuts a batch into parts.
        training: ``[training]``.
        accelerator: the device that clients train on.
        seed: the run's seed.
        initial: the initial LoRA of a layer, with ``B = 0``.
    """

    model: AdaptedModel
    loss: Callable[[Batch], Tensor]
    split: Split
    training: TrainingSettings
    accelerator: Accelerator
    seed: int
    initial: Callable[[str], LowRank]

    def load(self, at: GlobalModel, deviation: Deviation) -> None:
        """Make the model the personal one, ready to train: its backbone is the global model."""
        model = self.model
        model.backbone.set_shift(at.lora)
        model.load_head(
            {
                name: value + deviation.head[name] if name in deviation.head else value
                for name, value in at.head.items()
            }
        )
        model.load_lora({name: deviation.lora.get(name) or self.initial(name) for name in model.layers})
        model.train_only(("B", "A"))

    def train(
        self,
        at: GlobalModel,
        deviation: Deviation,
        data: Examples,
        *,
        purpose: tuple[str | int, ...],
        steps: int,
        lr: float,
        weight: float,
    ) -> Deviation:
        """Minimise ``loss(V) + weight/2 ||V - W||^2`` over the deviation; the model is then the personal one.

        Args:
            at: the global model ``W``.
            deviation: where training begins.
            data: the client's training rows.
            purpose: the parts of the seeds of batches and dropout.
            steps: number of optimiser steps.
            lr: the learning rate.
            weight: ``lambda``; 0 trains without a regulariser.

        Raises ``DivergedError`` as `fedsmoothlora.training.loop.train`.
        """
        model = self.model
        self.load(at, deviation)
        with checkpointing(model.model, self.training), model.calls_for_training():
            train(
                model.model,
                self._batches(data, steps, purpose),
                self.loss,
                self.training,
                lr=lr,
                accelerator=self.accelerator,
                seed=seed_for(self.seed, "dropout", *purpose),
                split=self.split,
                head=model.head_parameters(),
                corrections=self._corrections(at, weight),
            )
        head = {name: value - at.head[name].to(value) for name, value in model.head().items()}
        return Deviation(lora=model.lora(), head=head)

    def _corrections(self, at: GlobalModel, weight: float) -> list[Correction]:
        if not weight:
            return []
        trained, layers = self.model.trained_parameters(), self.model.layers
        products = [
            (trained[f"{name}.lora_B"], trained[f"{name}.lora_A"], layer.scale)
            for name, layer in layers.items()
        ]
        head = [(trained[name], value) for name, value in at.head.items()]
        return [towards(products, head, weight)]

    def _batches(self, data: Examples, steps: int, purpose: tuple[str | int, ...]) -> Iterable[Batch]:
        generator = torch.Generator().manual_seed(seed_for(self.seed, *purpose))
        order = BatchOrder(len(data), self.training.batch_size, generator)
        for rows in order.take(steps):
            yield data.batch(rows)
