"""The global weights: pretrained, plus all that the server merged, shifted for the client in hand."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

from fedsmoothlora.lowrank import LowRank
from fedsmoothlora.methods import Layer, Products

_NOTHING: Products = MappingProxyType({})


class Backbone(Protocol):
    """Global weights of the adapted layers, ``W = W^0 + s (merged + shift)``.

    ``merged`` is the sum of all server updates; ``shift`` belongs to whoever uses the model right now: a
    client's start, or the server's LoRA for an evaluation. Nothing of a shift survives the next `place`.
    """

    def merge(self, update: Products) -> None:
        """Add a server update for good: ``W^{t+1} = W^t + s * S^t``. `place` makes it effective."""
        ...

    def place(self, shift: Products = _NOTHING) -> None:
        """Make the model's weights ``W^t + s * shift``, computed anew from the pretrained ones."""
        ...

    def weight(self, name: str, shift: LowRank | None = None) -> Tensor:
        """One layer's weight ``W^t + s * shift``, ``(m, n)``, as `place` would set it."""
        ...


class RewrittenBackbone:
    """Float32 weights rewritten in place, always from the pretrained ones and the exact sum.

    Weights are never restored by subtracting what was added, so no client's visit leaves rounding behind,
    and the same updates give the same bits in any process. The sum stays factored while that is smaller
    than the dense matrix and becomes dense after, so memory does not grow without bound in rounds.

    Args:
        modules: the layers' own linear modules (without LoRA), by name.
        layers: their shapes and scales.

    Raises:
        ValueError: a weight is not float32 (rounding a low-precision weight at each rewrite would drift).
    """

    def __init__(self, modules: Mapping[str, nn.Module], layers: Mapping[str, Layer]) -> None:
        self._modules = dict(modules)
        self._layers = dict(layers)
        self._pretrained: dict[str, Tensor] = {}
        self._merged: dict[str, LowRank | Tensor] = {}
        for name, layer in self._layers.items():
            weight = self._weight_of(name)
            if weight.dtype != torch.float32:
                raise ValueError(
                    f"layer {name}: the backbone is {weight.dtype}; rewriting it needs float32 weights "
                    "(load the model in float32; mixed precision belongs to the computation)"
                )
            if weight.shape != (layer.m, layer.n):
                raise ValueError(f"layer {name}: weight {tuple(weight.shape)}, expected {(layer.m, layer.n)}")
            self._pretrained[name] = weight.clone()

    def merge(self, update: Products) -> None:
        """Add a server update to the exact sum."""
        for name, product in update.items():
            layer = self._layers[name]
            self._merged[name] = _add(self._merged.get(name), product.to(device=self._device(name)), layer)

    @torch.no_grad()
    def place(self, shift: Products = _NOTHING) -> None:
        """Rewrite every adapted layer's weight."""
        for name in self._layers:
            self._compute(name, shift.get(name), out=self._weight_of(name))

    @torch.no_grad()
    def weight(self, name: str, shift: LowRank | None = None) -> Tensor:
        """One layer's weight, without touching the model."""
        return self._compute(name, shift, out=torch.empty_like(self._pretrained[name]))

    def _compute(self, name: str, shift: LowRank | None, out: Tensor) -> Tensor:
        scale = self._layers[name].scale
        out.copy_(self._pretrained[name])
        merged = self._merged.get(name)
        for part in (merged, shift):
            if isinstance(part, LowRank):
                if part.rank:
                    out.addmm_(part.B.to(out), part.A.to(out), alpha=scale)
            elif part is not None:
                out.add_(part, alpha=scale)
        return out

    def _weight_of(self, name: str) -> Tensor:
        """The module's weight as ``(m, n)``: a view, transposed for ``Conv1D``, which stores (in, out)."""
        module = self._modules[name]
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.data if isinstance(module, nn.Linear) else weight.data.mT

    def _device(self, name: str) -> torch.device:
        return self._pretrained[name].device


def _add(total: LowRank | Tensor | None, product: LowRank, layer: Layer) -> LowRank | Tensor:
    """The exact sum, dense once its factors would hold more numbers than the matrix."""
    if isinstance(total, Tensor):
        return total + product.dense()
    total = product if total is None else total + product
    return total.dense() if total.rank * (layer.m + layer.n) > layer.m * layer.n else total
