"""The global weights: pretrained weights plus all server updates, shifted for the current client."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.errors import PrecisionError
from fedsmoothlora.methods import Coded, Layer, Products
from fedsmoothlora.modeling.keeping import kept, place_for
from fedsmoothlora.modeling.settings import KeepWeights

_NOTHING: Products = MappingProxyType({})


class Backbone(Protocol):
    """Global weights of the adapted layers, ``W = W^0 + s (merged + shift)``.

    ``merged`` is the sum of all server updates. ``shift`` is temporary: a client's start during its visit, or
    the server's LoRA during an evaluation. The next `set_shift` replaces it completely.
    """

    def merge(self, update: Coded) -> None:
        """Add a server update for good: ``W^{t+1} = W^t + s * S^t``. `place` makes it effective."""
        ...

    def set_shift(self, shift: Products = _NOTHING) -> None:
        """Set the model's weights to ``W^t + s * shift``, computed from the pretrained weights."""
        ...

    def weight(self, name: str, shift: LowRank | None = None) -> Tensor:
        """One layer's weight ``W^t + s * shift``, ``(m, n)``, as `set_shift` would set it."""
        ...

    def pretrained(self, name: str) -> Tensor:
        """One layer's pretrained weight ``W^0``, ``(m, n)``; not to be written to."""
        ...

    def merged(self, name: str) -> LowRank | Tensor | None:
        """The sum of a layer's server updates ``S^t``, without the scale ``s``; None before the first."""
        ...

    def delta(self, name: str, shift: LowRank | None = None) -> Tensor:
        """The change of a layer's weight by training: ``(W - (W^t + s * shift)) / s``, ``(m, n)``."""
        ...


class Merging:
    """The exact sum of all server updates, by layer.

    The sum is kept as factors while they are smaller than the dense matrix, and as the dense matrix
    afterwards, so memory is bounded however many rounds there are.

    Args:
        modules: the layers' own linear modules (without LoRA), by name.
        layers: their shapes and scales.

    Raises ``ValueError`` if the shape of a module differs from that of its layer.
    """

    def __init__(self, modules: Mapping[str, nn.Module], layers: Mapping[str, Layer]) -> None:
        self._modules = dict(modules)
        self._layers = dict(layers)
        self._merged: dict[str, LowRank | Tensor] = {}
        for name, layer in self._layers.items():
            if (shape := shape_of(self._modules[name])) != (layer.m, layer.n):
                raise ValueError(f"layer {name}: weight {shape}, expected {(layer.m, layer.n)}")

    def merge(self, update: Coded) -> None:
        """Add a server update to the exact sum; packed products are decoded."""
        for name, value in decoded(update).items():
            on_device = value.to(device=self._device(name))
            self._merged[name] = add_exactly(self._merged.get(name), on_device, self._layers[name])

    def merged(self, name: str) -> LowRank | Tensor | None:
        """The sum of all server updates of a layer."""
        return self._merged.get(name)

    def _device(self, name: str) -> torch.device:
        return self._modules[name].get_parameter("weight").device


class MergedBackbone(Merging):
    """Float32 weights that are rewritten in place, always from the pretrained weights and the exact sum.

    A shift is never removed by subtraction, so a client's visit leaves no rounding error behind, and the same
    updates give the same bits in every process.

    Args:
        modules: the layers' own linear modules (without LoRA), by name.
        layers: their shapes and scales.
        keep: ``machine.keep_weights``, the place of the pretrained weights; it changes no result.

    Raises:
        PrecisionError: a weight is not float32 (low-precision weights would drift, as each rewrite rounds
            them).
        OSError: there is no room on disk for the pretrained weights.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], layers: Mapping[str, Layer], keep: KeepWeights = "auto"
    ) -> None:
        super().__init__(modules, layers)
        for name in self._layers:
            if (dtype := self._weight_of(name).dtype) != torch.float32:
                raise PrecisionError(
                    f"layer {name}: the backbone is {dtype}; rewriting it needs float32 weights"
                )
        # Weights keep their stored layout, so `Conv1D`'s too are read in the order of their bytes.
        stored = {name: self._modules[name].get_parameter("weight").data for name in self._layers}
        self._pretrained = {
            name: weight if isinstance(self._modules[name], nn.Linear) else weight.mT
            for name, weight in kept(stored, place_for(keep, stored.values())).items()
        }

    @torch.no_grad()
    def set_shift(self, shift: Products = _NOTHING) -> None:
        """Rewrite every adapted layer's weight."""
        for name in self._layers:
            self._compute(name, shift.get(name), out=self._weight_of(name))

    @torch.no_grad()
    def weight(self, name: str, shift: LowRank | None = None) -> Tensor:
        """One layer's weight; the model is not changed."""
        return self._compute(name, shift, out=torch.empty_like(self._weight_of(name)))

    def pretrained(self, name: str) -> Tensor:
        """One layer's pretrained weight; not to be written to."""
        return self._pretrained[name].to(self._device(name))

    @torch.no_grad()
    def delta(self, name: str, shift: LowRank | None = None) -> Tensor:
        """The change of a layer's weight by training, divided by ``s``."""
        return (self._weight_of(name) - self.weight(name, shift)) / self._layers[name].scale

    def _compute(self, name: str, shift: LowRank | None, out: Tensor) -> Tensor:
        pretrained = self._pretrained[name]
        out.copy_(pretrained, non_blocking=pretrained.is_pinned())
        return add_in_place(out, (self._merged.get(name), shift), self._layers[name].scale)

    def _weight_of(self, name: str) -> Tensor:
        """The module's weight as ``(m, n)``: a view, transposed for ``Conv1D``, which stores (in, out)."""
        module = self._modules[name]
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.data if isinstance(module, nn.Linear) else weight.data.mT


def shape_of(module: nn.Module) -> tuple[int, int]:
    """``(m, n)`` = (out, in features) of a linear layer, however its weight is stored."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def add_in_place(weight: Tensor, parts: Iterable[LowRank | Tensor | None], scale: float) -> Tensor:
    """``weight += s * part`` for every part, ``(m, n)``."""
    for part in parts:
        if isinstance(part, LowRank):
            if part.rank:
                weight.addmm_(part.B.to(weight), part.A.to(weight), alpha=scale)
        elif part is not None:
            weight.add_(part, alpha=scale)
    return weight


def add_exactly(total: LowRank | Tensor | None, product: LowRank | Tensor, layer: Layer) -> LowRank | Tensor:
    """The exact sum; a dense matrix once the factors would hold more numbers than it."""
    if isinstance(total, Tensor) or isinstance(product, Tensor):
        parts = [
            part.dense() if isinstance(part, LowRank) else part
            for part in (total, product)
            if part is not None
        ]
        return parts[0] + parts[1] if len(parts) == 2 else parts[0].clone()
    total = product if total is None else total + product
    return total.dense() if total.rank * (layer.m + layer.n) > layer.m * layer.n else total
