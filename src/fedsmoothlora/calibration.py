"""The calibration gradient of chosen linear layers, from hooks, with every weight frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedsmoothlora.backbone import shape_of
from fedsmoothlora.training import DivergedError

Batch = TypeVar("Batch")


def calibration_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    loss: Callable[[Batch], Tensor],
    split: Callable[[Batch], Iterable[tuple[Batch, float]]] = lambda batch: [(batch, 1.0)],
) -> dict[str, Tensor]:
    """``G = mean over batches of dLoss/dW`` of every module, ``(m, n)``, float32.

    A linear layer's gradient is ``dY^T X``, ``X (tokens, n)`` its input and ``dY (tokens, m)`` the gradient
    of its output. Both pass through hooks, so no weight needs a gradient: autograd forms none, the graph
    starts at the first of the modules, and frozen or quantised weights work.

    The model is in evaluation mode meanwhile. Its modes, ``requires_grad`` flags and buffers are restored
    afterwards, and no ``.grad`` is left behind, also when the loss raises.

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
    totals: dict[str, Tensor] = {}
    count = 0
    with _undisturbed(model), _recording(modules, totals):
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
    for name, module in modules.items():
        # A layer that the forward pass never reached has gradient zero.
        if name not in totals:
            totals[name] = torch.zeros(shape_of(module), device=module.get_parameter("weight").device)
        if not bool(torch.isfinite(totals[name]).all()):
            raise DivergedError(f"the calibration gradient of layer {name} is not finite")
    return {name: totals[name].div_(count) for name in modules}  # in place: one gradient a layer is held


@contextmanager
def _recording(modules: Mapping[str, nn.Module], totals: dict[str, Tensor]) -> Iterator[None]:
    """Add ``dY^T X`` of every backward pass to ``totals``."""
    handles = [module.register_forward_hook(_forward_hook(name, totals)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward_hook(name: str, totals: dict[str, Tensor]) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        X = inputs[0].detach().flatten(0, -2)  # (tokens, n)

        def add(gradient: Tensor) -> None:
            dY = gradient.detach().flatten(0, -2)  # (tokens, m)
            if dY.dtype != torch.float32 or X.dtype != torch.float32:
                # Under autocast; the sum over tokens is float32 all the same.
                outer = dY.float().mT @ X.float()
            elif name in totals:
                totals[name].addmm_(dY.mT, X)
                return
            else:
                outer = dY.mT @ X
            totals[name] = totals[name].add_(outer) if name in totals else outer  # (m, n)

        if output.requires_grad:
            output.register_hook(add)
            return None
        # The graph starts here. The clone is what follows works on: an in-place operation on a leaf would
        # be an error.
        output.requires_grad_().register_hook(add)
        return output.clone()

    return hook


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
