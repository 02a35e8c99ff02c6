"""One client's local training: a plain loop with a fresh optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.errors import ConfigError, DivergedError


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The keys of ``[training]``.

    Attributes:
        rounds: rounds of the federation.
        epochs: passes over a client's training rows in a round (unless ``steps``); 1 unless set.
        steps: optimiser steps of a client in a round, in place of ``epochs``.
        count_calibration: take a client's calibration batches off its optimiser steps (one is left at
            least), so that all methods read as many batches in a round.
        batch_size: rows a step.
        accumulation: cut each step's batch into so many parts, one forward and backward pass each, whose
            gradients add up to the whole batch's: less memory, the same step. Texts of like length go
            together.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them, in
            training and calibration; for models of transformers.
        precision: ``bf16`` computes training and calibration under bfloat16 autocast; weights, LoRA factors,
            gradients, uploads and evaluations stay float32.
        optimizer: ``sgd`` or ``adamw``; fresh in each round.
        lr: learning rate of the first round; a cosine over the rounds takes it to ``lr_min``.
        lr_min: where the cosine ends.
        momentum: of SGD; 0.9 unless set.
        weight_decay: of the optimiser.
        max_grad_norm: clips the norm of the gradient; off unless set.
        proximal_mu: FedProx: ``mu/2 ||theta - theta_start||^2`` is added to a client's loss; 0 is off.
        scaffold: SCAFFOLD's control variates; for ``fedit``, ``ffa`` and ``full`` with plain SGD.
    """

    rounds: Annotated[int, Ge(1)] = 10
    epochs: Annotated[int, Ge(1)] | None = None
    steps: Annotated[int, Ge(1)] | None = None
    count_calibration: bool = False
    batch_size: Annotated[int, Ge(1)] = 64
    accumulation: Annotated[int, Ge(1)] = 1
    gradient_checkpointing: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Gt(0)] = 0.003
    lr_min: Annotated[float, Ge(0)] = 0.0
    momentum: Annotated[float, Interval(ge=0, lt=1)] | None = None
    weight_decay: Annotated[float, Ge(0)] = 0.0
    max_grad_norm: Annotated[float, Gt(0)] | None = None
    proximal_mu: Annotated[float, Ge(0)] = 0.0
    scaffold: bool = False

    def steps_for(self, rows: int, calibration: int = 0) -> int:
        """Optimiser steps in a round for a client with that many training rows.

        Args:
            rows: the client's.
            calibration: batches that its method reads beside them.
        """
        steps = self.steps
        if steps is None:
            steps = (self.epochs or 1) * math.ceil(rows / self.batch_size)
        return max(1, steps - calibration) if self.count_calibration else steps


# A batch in parts, each with its share of the batch's mean loss; see `tasks.Task.parts`.
Split = Callable[[Batch], Iterable[tuple[Batch, float]]]


def whole(batch: Batch) -> Iterable[tuple[Batch, float]]:
    """The batch as its only part."""
    return [(batch, 1.0)]


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[Batch], Tensor],
    settings: TrainingSettings,
    *,
    lr: float,
    accelerator: Accelerator,
    seed: int,
    split: Split = whole,
    corrections: Sequence[Callable[[], None]] = (),
    on_step: Callable[[float], None] = lambda loss: None,
) -> list[float]:
    """Train the model's unfrozen parameters in place with a fresh optimiser.

    Normalisation layers with running statistics stay in evaluation mode: the backbone is frozen, and a
    client's statistics must not reach the next client.

    Args:
        model: the model.
        batches: one a step.
        loss: a batch's mean loss, computed with ``model``.
        settings: ``[training]``.
        lr: this round's learning rate.
        accelerator: runs backward and clips.
        seed: of dropout; the global generator is left as it was.
        split: a batch's parts, whose gradients are accumulated.
        corrections: of the gradients, after each backward pass and before they are clipped.
        on_step: told each step's loss.

    Returns:
        The loss of every step.

    Raises:
        DivergedError: a loss or, at the end, a trained parameter is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(parameters, settings, lr)
    losses: list[float] = []
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in batches:
            losses.append(_backward(split(batch), loss, accelerator))
            if not math.isfinite(losses[-1]):
                raise DivergedError(f"the loss is {losses[-1]} at step {len(losses)}")
            for correct in corrections:
                correct()
            if settings.max_grad_norm is not None:
                accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            on_step(losses[-1])
    model.eval()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise DivergedError(f"trained weights are not finite after step {len(losses)}")
    return losses


def _backward(
    parts: Iterable[tuple[Batch, float]], loss: Callable[[Batch], Tensor], accelerator: Accelerator
) -> float:
    """Add the gradient of ``sum of share · loss(part)``, and return the sum; ends where it is not finite."""
    total = 0.0
    for part, share in parts:
        value = loss(part) * share
        total += float(value.detach())
        if not math.isfinite(total):
            break
        accelerator.backward(value)
    return total


def autocast(settings: TrainingSettings, device: torch.device) -> torch.autocast:
    """The context in which training and calibration compute."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.precision == "bf16")


@contextmanager
def checkpointing(model: nn.Module, settings: TrainingSettings) -> Iterator[None]:
    """Gradient checkpointing while training, where it is wanted.

    Raises ``ConfigError`` if the model does not know how.
    """
    if not settings.gradient_checkpointing:
        yield
        return
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"training.gradient_checkpointing = true: {type(model).__name__} cannot; leave it out"
        )
    # The other kind needs inputs with gradients, and with a frozen backbone there are none.
    enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()  # type: ignore[operator]


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Inside `checkpointing`: its blocks compute their activations again in evaluation mode too.

    By themselves they do so in training mode alone, in which they would drop out as well.
    """
    blocks = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block in blocks:
            del block.forward  # which uncovers that of its class


def to_device(batch: Batch, accelerator: Accelerator) -> Batch:
    """The batch on the accelerator's device."""
    return {name: tensor.to(accelerator.device) for name, tensor in batch.items()}


def _optimizer(
    parameters: Sequence[nn.Parameter], settings: TrainingSettings, lr: float
) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=settings.weight_decay)
    momentum = 0.9 if settings.momentum is None else settings.momentum
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=settings.weight_decay)
