"""Calibration gradients of chosen linear layers, or sketches of them, by hooks, with frozen weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedsmoothlora.algebra.finite import are_finite
from fedsmoothlora.algebra.sketches import Sketch
from fedsmoothlora.errors import DivergedError
from fedsmoothlora.modeling.backbone import shape_of
from fedsmoothlora.training.loop import kept_buffers, recomputing, seeded
from fedsmoothlora.training.prefetch import prefetched

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
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """``G = mean over batches of dLoss/dW`` of every module, ``(m, n)``, float32.

    A linear layer's gradient is ``dY^T X``, where ``X (tokens, n)`` is its input and ``dY (tokens, m)`` is
    the gradient of its output. Hooks record both, so no weight needs a gradient: autograd computes none for
    weights, the graph starts at the first of the modules, and frozen or quantised weights work.

    The model is in evaluation mode while gradients are computed. Afterwards its modes, ``requires_grad``
    flags and buffers are restored and no ``.grad`` is left, even if the loss raises an error. A layer's input
    is kept until the layer's backward pass. With gradient checkpointing it is recomputed instead.

    Args:
        model: the model, at the weights where the gradient is wanted.
        modules: its linear modules, fused (``qkv``) or separate, by name; weights may be stored
            transposed (``Conv1D``).
        batches: calibration batches; all have the same weight in the mean.
        loss: a batch's mean loss over its samples, computed with ``model``.
        split: a batch's parts and their shares of its mean loss, one backward pass each.
        seed: seed of the data set's draws; the states of the global generators are restored.

    Raises:
        ValueError: there is no batch.
        DivergedError: a batch's loss, or the gradient, is not finite.
    """
    totals = {name: _Total() for name in modules}
    count = _one_pass(
        model, modules, {name: total.add for name, total in totals.items()}, batches, loss, split, seed
    )
    return _means(totals, modules, count)


def calibration_sketches(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    sketches: Mapping[str, Sketch],
    batches: Callable[[], Iterable[Batch]],
    loss: Loss[Batch],
    split: Split[Batch] = lambda batch: [(batch, 1.0)],
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Fill ``sketches`` with the gradients of their modules, and return the gradients of all other modules.

    The dense gradient of a sketched module is never formed. Sketches may need several passes over the
    batches; the returned gradients are computed in the first.

    Args:
        sketches: new sketches, by name of the module.
        batches: a function that returns the same batches in each pass.
        model, modules, loss, split, seed: as in `calibration_gradients`.

    Raises:
        ValueError, DivergedError: as in `calibration_gradients`.
    """
    totals = {name: _Total() for name in modules.keys() - sketches.keys()}
    gradients: dict[str, Tensor] = {}
    first = True
    while first or any(sketch.passes_left for sketch in sketches.values()):
        going = {name: sketch for name, sketch in sketches.items() if sketch.passes_left}
        adds: dict[str, Add] = {name: sketch.add for name, sketch in going.items()}
        if first:
            adds |= {name: total.add for name, total in totals.items()}
        count = _one_pass(model, modules, adds, batches(), loss, split, seed)
        if first:
            gradients = _means(totals, modules, count)
            first = False
        for name, sketch in going.items():
            if not sketch.finite:
                raise _not_finite(name)
            sketch.turn()
    return gradients


class _Total:
    """The sum of ``dY^T X`` over batches: one float32 matrix of the weight's size."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None  # (m, n)

    def add(self, dY: Tensor, X: Tensor) -> None:
        # Under autocast both are bfloat16. The sum over tokens is computed in float32.
        if multiplies_mixed(dY, X):
            product = torch.mm(dY.mT, X, out_dtype=torch.float32)
            self.sum = product if self.sum is None else self.sum.add_(product)
            return
        dY, X = dY.float(), X.float()
        self.sum = dY.mT @ X if self.sum is None else self.sum.addmm_(dY.mT, X)


def _means(totals: Mapping[str, _Total], modules: Mapping[str, nn.Module], count: int) -> dict[str, Tensor]:
    """The mean gradient of every module; the values that tell whether they are finite are read at once."""
    sums = {name: total.sum for name, total in totals.items() if total.sum is not None}
    if sums:
        for name, finite in zip(sums, are_finite(sums.values()).tolist(), strict=True):
            if not finite:
                raise _not_finite(name)
    return {
        name: sums[name].div_(count)
        if name in sums  # otherwise the forward pass does not use this layer
        else torch.zeros(shape_of(modules[name]), device=modules[name].get_parameter("weight").device)
        for name in totals
    }


def multiplies_mixed(one: Tensor, other: Tensor) -> bool:
    """Whether a product of bfloat16 matrices can be summed in float32: on CUDA, from PyTorch 2.8.

    On the CPU, PyTorch rounds the sums to bfloat16.
    """
    return (
        one.device.type == "cuda"
        and one.dtype == other.dtype == torch.bfloat16
        and "dtype" in torch.ops.aten.mm.overloads()
    )


def _not_finite(name: str) -> DivergedError:
    return DivergedError(f"the calibration gradient of layer {name} is not finite")


def _one_pass(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    adds: Mapping[str, Add],
    batches: Iterable[Batch],
    loss: Loss[Batch],
    split: Split[Batch],
    seed: int,
) -> int:
    """Run forward and backward passes of all batches, call ``adds``, and return the number of batches."""
    cut = (list(split(batch)) for batch in batches)
    losses: list[Tensor] = []  # of the parts of all batches
    owners: list[int] = []  # the number of the batch of each part
    count = 0
    device = next(model.parameters()).device
    with (
        seeded(seed, device),
        _undisturbed(model),
        recomputing(model),
        _recording(modules, adds),
        prefetched(cut, device) as ready,
    ):
        for count, parts in enumerate(ready, start=1):
            for part, share in parts:
                value = loss(part) * share
                losses.append(value.detach().reshape(()))
                owners.append(count)
                if value.requires_grad:  # otherwise the forward pass used none of the modules
                    value.backward()
    # Read at the end, because reading a value waits for the device.
    for number, value in zip(owners, torch.stack(losses).tolist() if losses else [], strict=True):
        if not math.isfinite(value):
            raise DivergedError(f"the loss of calibration batch {number} is {value}")
    if count == 0:
        raise ValueError("a calibration gradient needs at least one batch")
    return count


@contextmanager
def _recording(modules: Mapping[str, nn.Module], adds: Mapping[str, Add]) -> Iterator[None]:
    """Call each layer's function in ``adds`` with ``dY`` and ``X`` in every backward pass."""
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
    """Return a layer's output unchanged; in the backward pass, call ``add`` with ``dY`` and ``X``.

    The input is saved by ``save_for_backward``, so it is freed with the rest of the graph, and checkpointing
    recomputes it. Earlier layers need no gradient: ``anchor`` requires one so that the graph starts here.
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
    """Freeze all parameters in evaluation mode; restore flags, modes and buffers at the end."""
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad(), kept_buffers(model):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, mode in modes.items():
            module.training = mode
