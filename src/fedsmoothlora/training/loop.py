"""One client's local training: a plain loop with a fresh optimiser."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedsmoothlora.algebra.finite import are_finite
from fedsmoothlora.data.examples import Batch, DeviceBatch
from fedsmoothlora.errors import ConfigError, DivergedError
from fedsmoothlora.modeling.versions import checkpointing_switches
from fedsmoothlora.training.prefetch import Parts, prefetched
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
    head: Collection[nn.Parameter] = (),
    corrections: Sequence[Callable[[], None]] = (),
    first: Mapping[nn.Parameter, Tensor] = MappingProxyType({}),
    on_step: Callable[[float], None] = lambda loss: None,
) -> list[float]:
    """Train the model's unfrozen parameters in place with a fresh optimiser.

    Normalisation layers with running statistics stay in evaluation mode: the backbone is frozen, and a
    client's statistics must not reach the next client.

    An accelerator computes behind the program, which waits for it wherever a value is read. So there the loss
    of a step is read one step late, and nothing else is read. On the CPU it is read in its own step.

    Args:
        model: the model.
        batches: one batch for each step.
        loss: a batch's mean loss, computed with ``model``.
        settings: ``[training]``.
        lr: this round's learning rate.
        accelerator: the device; it runs the backward pass and clips gradients.
        seed: seed of dropout and of the data set's draws; the states of the global generators are restored.
        split: cuts a batch into parts, whose gradients are accumulated.
        head: the parameters that are trained at ``training.head_lr``.
        corrections: functions that change the gradients after the backward pass and before clipping.
        first: gradients of a further step before those of the batches; it changes no other parameters.
        on_step: called with the loss of each step.

    Returns:
        The loss of every step.

    Raises:
        DivergedError: a loss or, at the end, a trained parameter is not finite.
    """

    def step() -> None:
        for correct in corrections:
            correct()
        if settings.max_grad_norm is not None:
            accelerator.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(parameters, settings, lr, accelerator.device, head)
    losses = Losses(on_step, late=0 if accelerator.device.type == "cpu" else 1)
    model.train()
    still_normalisation(model)
    cut = (list(split(batch)) for batch in batches)
    with (
        seeded(seed, accelerator.device),
        kept_buffers(model),
        prefetched(cut, accelerator.device) as ready,
    ):
        if first:
            for parameter, gradient in first.items():
                parameter.grad = gradient
            step()
        for parts in ready:
            losses.add(_backward(parts, loss, accelerator))
            step()
            losses.step_ends()
        losses.training_ends()
    model.eval()
    if parameters and not bool(are_finite(parameters).all()):
        raise DivergedError(f"trained weights are not finite after step {len(losses.read)}")
    return losses.read


class Losses:
    """The losses of the steps of training, read from the device once a step and ``late`` steps late.

    Args:
        on_step: called with the loss of each step, once it is read.
        late: the number of steps.

    Attributes:
        read: the losses that were read.
    """

    def __init__(self, on_step: Callable[[float], None], late: int) -> None:
        self._on_step, self._late = on_step, late
        self._waiting: deque[Tensor] = deque()  # the losses of the parts of a step, (parts,)
        self.read: list[float] = []

    def add(self, parts: Tensor) -> None:
        """Add the losses of a step's parts, ``(parts,)``, whose sum is the step's loss."""
        self._waiting.append(parts)

    def step_ends(self) -> None:
        """Read what is due. Raises ``DivergedError`` if a loss is not finite."""
        while len(self._waiting) > self._late:
            self._read_one()

    def training_ends(self) -> None:
        """Read all that is left. Raises ``DivergedError`` if a loss is not finite."""
        while self._waiting:
            self._read_one()

    def _read_one(self) -> None:
        total = 0.0
        for value in self._waiting.popleft().tolist():  # `sum` rounds otherwise from Python 3.12 on
            total += value
        self.read.append(total)
        if not math.isfinite(total):
            raise DivergedError(f"the loss is {total} at step {len(self.read)}")
        self._on_step(total)


def _backward(parts: Parts[Batch], loss: Callable[[Batch], Tensor], accelerator: Accelerator) -> Tensor:
    """Add the gradient of ``sum of share · loss(part)``, and return the terms of the sum, ``(parts,)``."""
    values = []
    for part, share in parts:
        value = loss(part) * share
        accelerator.backward(value)
        values.append(value.detach().reshape(()))
    return torch.stack(values)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python; restore their states at the end.

    Models draw from NumPy's too (SpecAugment and LayerDrop of Wav2Vec2), and data sets from any of them.
    """
    gpus = []
    if device.type == "cuda":
        gpus = [torch.cuda.current_device() if device.index is None else device.index]
    of_numpy, of_python = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        with torch.random.fork_rng(gpus):
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            random.seed(seed)
            yield
    finally:
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)


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
    switches = checkpointing_switches(model)
    if switches is None:
        raise ConfigError(
            f"training.gradient_checkpointing = true: {type(model).__name__} does not support it; remove it"
        )
    # Reentrant checkpointing needs inputs that require gradients. With a frozen backbone they do not.
    enable, disable = switches
    enable({"use_reentrant": False})
    try:
        yield
    finally:
        disable()


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Make the blocks of `checkpointing` recompute their activations in evaluation mode too.

    By default they do so only in training mode, in which dropout would be active as well. There they
    also fill no cache of keys and values, to which a second computation would add.
    """
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    caching = [config for config in configs if getattr(config, "use_cache", False)]
    blocks = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    try:
        for config in caching:
            config.use_cache = False
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own method is used again
        for config in caching:
            config.use_cache = True


def to_device(batch: Batch, accelerator: Accelerator) -> Batch:
    """The batch on the accelerator's device; a copy from pinned memory does not wait."""
    device = accelerator.device
    if device.type == "cpu":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    moved = {name: tensor.to(device, non_blocking=tensor.is_pinned()) for name, tensor in batch.items()}
    return DeviceBatch(moved, batch)


def still_normalisation(model: nn.Module) -> None:
    """Put normalisation layers with running statistics into evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Restore the model's buffers at the end.

    Moving averages, or the vectors of spectral normalisation, change in training. They are not part of an
    upload or a checkpoint, so those of a client must not reach the next client, the global model or an
    export.
    """
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                buffer.copy_(value)
                setattr(module, name, buffer)  # a module may have another tensor in its place


def optimizer_of(
    parameters: Sequence[nn.Parameter],
    settings: TrainingSettings,
    lr: float,
    device: torch.device,
    head: Collection[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """A fresh optimiser of ``[training]`` with the learning rate of the round.

    With ``training.head_lr``, the learning rate of the head's parameters is ``lr · head_lr / settings.lr``.
    """
    groups: list[dict[str, Any]] = [{"params": list(parameters)}]
    if settings.head_lr is not None:
        of_head = {id(parameter) for parameter in head}
        rest = [parameter for parameter in parameters if id(parameter) not in of_head]
        own = [parameter for parameter in parameters if id(parameter) in of_head]
        scaled = {"params": own, "lr": lr * settings.head_lr / settings.lr}
        groups = [group for group in ({"params": rest}, scaled) if group["params"]]
    if settings.optimizer == "adamw":
        # On a GPU one kernel updates all parameters. Elsewhere torch chooses.
        fused = True if device.type == "cuda" else None
        return torch.optim.AdamW(groups, lr=lr, weight_decay=settings.weight_decay, fused=fused)
    momentum = 0.9 if settings.momentum is None else settings.momentum
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=settings.weight_decay)
