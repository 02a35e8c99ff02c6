"""One client's local training: a plain loop with a fresh optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedsmoothlora.algebra.finite import all_finite
from fedsmoothlora.data.examples import Batch
from fedsmoothlora.errors import ConfigError, DivergedError
from fedsmoothlora.training.settings import TrainingSettings

# Cuts a batch into parts, each with its share of the batch's mean loss (`tasks.objectives.Objective.parts`).
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
        batches: one batch for each step.
        loss: a batch's mean loss, computed with ``model``.
        settings: ``[training]``.
        lr: this round's learning rate.
        accelerator: runs the backward pass and clips gradients.
        seed: seed of dropout; the state of the global generator is restored afterwards.
        split: cuts a batch into parts, whose gradients are accumulated.
        corrections: functions that change the gradients after the backward pass and before clipping.
        on_step: called with the loss of each step.

    Returns:
        The loss of every step.

    Raises:
        DivergedError: a loss or, at the end, a trained parameter is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(parameters, settings, lr)
    losses: list[float] = []
    model.train()
    still_normalisation(model)
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
    if not all(map(all_finite, parameters)):
        raise DivergedError(f"trained weights are not finite after step {len(losses)}")
    return losses


def _backward(
    parts: Iterable[tuple[Batch, float]], loss: Callable[[Batch], Tensor], accelerator: Accelerator
) -> float:
    """Add the gradient of ``sum of share · loss(part)`` and return the sum; stop once it is not finite."""
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
    """Switch on gradient checkpointing if ``training.gradient_checkpointing`` is set.

    Raises ``ConfigError`` if the model does not support it.
    """
    if not settings.gradient_checkpointing:
        yield
        return
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None or not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"training.gradient_checkpointing = true: {type(model).__name__} does not support it; remove it"
        )
    # Reentrant checkpointing needs inputs that require gradients. With a frozen backbone they do not.
    enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.activation_checkpointing_disable()  # type: ignore[operator]


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Make the blocks of `checkpointing` recompute their activations in evaluation mode too.

    By default they do so only in training mode, in which dropout would be active as well.
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
            del block.forward  # the class's own method is used again


def to_device(batch: Batch, accelerator: Accelerator) -> Batch:
    """The batch on the accelerator's device."""
    return {name: tensor.to(accelerator.device) for name, tensor in batch.items()}


def still_normalisation(model: nn.Module) -> None:
    """Put normalisation layers with running statistics into evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def optimizer_of(
    parameters: Sequence[nn.Parameter], settings: TrainingSettings, lr: float
) -> torch.optim.Optimizer:
    """A fresh optimiser of ``[training]`` with the learning rate of the round."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=settings.weight_decay)
    momentum = 0.9 if settings.momentum is None else settings.momentum
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=settings.weight_decay)
