"""The local training that a client's round pauses for, and its result."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.methods import Products, Start
from fedsmoothlora.training.corrections import Correction
from fedsmoothlora.training.loop import Split


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """One client's local training in a round.

    Attributes:
        start: the start of training.
        head: the parameters of a fully trained head at the start.
        steps: the number of batches.
        batches: one batch for each step.
        loss: a batch's mean loss, computed with a model.
        split: cuts a batch into parts, whose gradients are accumulated.
        lr: the learning rate of the round.
        seed: seed of dropout.
        corrections: the functions that change the gradients of these parameters before clipping.
        on_step: called with the loss of each step.
    """

    start: Start
    head: Mapping[str, Tensor]
    steps: int
    batches: Iterable[Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    split: Split
    lr: float
    seed: int
    corrections: Callable[[Mapping[str, nn.Parameter]], Sequence[Correction]]
    on_step: Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The result of a client's local training.

    Attributes:
        losses: the loss of every step.
        seconds: the time that the training took.
        lora: the trained factors by layer, if the client was trained beside the model.
        head: the trained head, if the client was trained beside the model; None if the model is the trained
            one.
    """

    losses: Sequence[float]
    seconds: float
    lora: Products = field(default_factory=dict)
    head: Mapping[str, Tensor] | None = None


Found = TypeVar("Found")
# A client's round, which yields its local training, is sent the result, and returns what was found.
Visiting = Generator[LocalTraining, Trained, Found]
