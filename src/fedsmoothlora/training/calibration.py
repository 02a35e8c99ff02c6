"""The calibration gradient of chosen linear layers, or sketches of it, from hooks, with weights frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedsmoothlora.algebra.sketches import Sketch
from fedsmoothlora.errors import DivergedError
from fedsmoothlora.modeling.backbone import shape_of
from fedsmoothlora.training.loop import recomputing

Batch = TypeVar("Batch")
Loss = Callable[[Batch], Tensor]
# A batch's parts and their shares of its mean loss.
Split = Callable[[Batch], Iterable[tuple[Batch, float]]]
# Called with a layer's output gradient dY (tokens, m) and input X (tokens, n), for each backward pass.
Add = Callable[[Tensor, Tensor], None]


def calibration_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    loss: Loss[Batch],
    split: Split[Batch] = lambda batch: [(batch, 1.0)],
) -> dict[str, Tensor]:
    """``G = mean over batches of dLoss/dW`` of every module, ``(m, n)``, float32.

    A linear layer's gradient is ``dY^T X``, ``X (tokens, n)`` its input and ``dY (tokens, m)`` the gradient
    of its output. Both pass through hooks, so no weight needs a gradient: autograd forms none, the graph
    starts at the first of the modules, and frozen or quantised weights work.

    The model is in evaluation mode meanwhile. Its modes, ``requires_grad`` flags and buffers are restored
    afterwards, and no ``.grad`` is left behind, also when the loss raises. Inputs are kept as autograd keeps
    its own: until their layer's backward pass, and with gradient checkpointing not at all.

    Args:
        model: the model, at the weights where the gradient is wanted.
        modules: its linear modules, fused (``qkv``) or separate, by name; weights may be stored
            transposed (``Conv1D``).
        batches: calibration batches; the mean weighs each alike.
        loss: a batch's mean loss over its samples, computed with ``model``.
        split: a batch's parts and their shares of its mean loss, one backward pass each.

    Raises:
        ValueError: there is no batch.
        DivergedError: a batch's loss, or the gradient, is not finite.
    """
    totals = {name: _Total() for name in modules}
    count = _one_pass(
        model, modules, {name: total.add for name, total in totals.items()}, batches, loss, split
    )
    return {name: totals[name].mean(name, module, count) for name, module in modules.items()}


def calibration_sketches(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    sketches: Mapping[str, Sketch],
    batches: Callable[[], Iterable[Batch]],
    loss: Loss[Batch],
    split: Split[Batch] = lambda batch: [(batch, 1.0)],
) -> dict[str, Tensor]:
    """Complete ``sketches`` of modules' gradients, and give the gradients of the modules that have none.

    The gradient of a sketched module never exists. Gradients of the others are of the first pass.

    Args:
        sketches: by a module's name, as they were made.
        batches: gives the same batches for each of the passes.
        model, modules, loss, split: as in `calibration_gradients`.

    Raises as `calibration_gradients`.
    """
    totals = {name: _Total() for name in modules.keys() - sketches.keys()}
    gradients: dict[str, Tensor] = {}
    first = True
    while first or any(sketch.passes_left for sketch in sketches.values()):
        going = {name: sketch for name, sketch in sketches.items() if sketch.passes_left}
        adds: dict[str, Add] = {name: sketch.add for name, sketch in going.items()}
        if first:
            adds |= {name: total.add for name, total in totals.items()}
        count = _one_pass(model, modules, adds, batches(), loss, split)
        if first:
            gradients = {name: total.mean(name, modules[name], count) for name, total in totals.items()}
            first = False
        for name, sketch in going.items():
            if not sketch.finite:
                raise _not_finite(name)
            sketch.turn()
    return gradients


class _Total:
    """The sum of ``dY^T X``, float32; one matrix of the weight's size is held."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None  # (m, n)

    def add(self, dY: Tensor, X: Tensor) -> None:
        # Under autocast they are bfloat16; the sum over tokens is float32 all the same.
        dY, X = dY.float(), X.float()
        self.sum = dY.mT @ X if self.sum is None else self.sum.addmm_(dY.mT, X)

    def mean(self, name: str, module: nn.Module, count: int) -> Tensor:
        if self.sum is None:  # the forward pass never reached it
            return torch.zeros(shape_of(module), device=module.get_parameter("weight").device)
        if not bool(torch.isfinite(self.sum).all()):
            raise _not_finite(name)
        return self.sum.div_(count)


def _not_finite(name: str) -> DivergedError:
    return DivergedError(f"the calibration gradient of layer {name} is not finite")


def _one_pass(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    adds: Mapping[str, Add],
    batches: Iterable[Batch],
    loss: Loss[Batch],
    split: Split[Batch],
) -> int:
    """Forward and backward of every batch, telling ``adds``; returns how many batches there were."""
    count = 0
    with _undisturbed(model), recomputing(model), _recording(modules, adds):
        for batch in batches:
            count += 1
            for part, share in split(batch):
                value = loss(part) * share
                if not bool(torch.isfinite(value)):
                    raise DivergedError(f"the loss of calibration batch {count} is {float(value.detach())}")
                if value.requires_grad:  # else the forward pass met none of the modules
                    value.backward()
    if count == 0:
        raise ValueError("a calibration gradient needs at least one batch")
    return count


@contextmanager
def _recording(modules: Mapping[str, nn.Module], adds: Mapping[str, Add]) -> Iterator[None]:
    """Tell ``adds`` the ``dY`` and ``X`` of every backward pass."""
    handles = [modules[name].register_forward_hook(_forward_hook(add)) for name, add in adds.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward_hook(add: Add) -> Callable[..., Tensor]:
    anchor = torch.empty(0, requires_grad=True)

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return _Tap.apply(output, inputs[0], anchor, add)

    return hook


class _Tap(torch.autograd.Function):
    """A layer's output as it is; its backward pass tells ``add`` of ``dY`` and ``X``.

    The input is saved as autograd saves what it needs itself, so it is let go with the rest of the graph,
    and checkpointing computes it again instead of keeping it. The anchor makes the graph start here, where
    nothing before has a gradient.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, X: Tensor, anchor: Tensor, add: Add) -> Tensor:
        ctx.save_for_backward(X)
        ctx.add = add
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None, None, None]:
        (X,) = ctx.saved_tensors
        ctx.add(dY.flatten(0, -2), X.flatten(0, -2))
        return dY, None, None, None


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with all parameters frozen; flags, modes and buffers as before when it ends."""
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers.items():
                buffer.copy_(value)
