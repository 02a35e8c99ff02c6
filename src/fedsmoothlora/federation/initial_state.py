"""The state that server and clients share before round 0: pretrained weights, and seeded draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.seeds import generator_for
from fedsmoothlora.algebra.update import Layer, Products
from fedsmoothlora.federation.transport import Transport


@dataclass(frozen=True)
class InitialState:
    """The state that server and clients share before round 0.

    Attributes:
        layers: the adapted layers.
        seed: the run's seed.
        pretrained: ``pretrained(name)`` is the pretrained weight of a layer, ``(m, n)``.
        head: the parameters of a fully trained head before training.
        transport: the number format of sent factors, to which the initial LoRA is rounded too.
        prepared: the result of `Method.prepare`.
    """

    layers: Mapping[str, Layer]
    seed: int
    pretrained: Callable[[str], Tensor]
    head: Mapping[str, Tensor] = field(default_factory=dict)
    transport: Transport = field(default_factory=Transport)
    prepared: Products = field(default_factory=dict, repr=False)

    def orthonormal(self, name: str) -> LowRank:
        """Random orthonormal columns ``B (m, r)`` and rows ``A (r, n)``, the same for server and clients."""
        layer = self.layers[name]
        generator = generator_for(self.seed, "orthonormal factors", name)
        B, A = (
            torch.linalg.qr(torch.randn(size, layer.rank, generator=generator)).Q
            for size in (layer.m, layer.n)
        )
        return LowRank(B.contiguous(), A.mT.contiguous())

    def initial(self, name: str, rank: int | None = None) -> LowRank:
        """PEFT's initial LoRA: ``B = 0``, ``A`` uniform in ``±1/sqrt(n)``; the same for all clients.

        A client of lower ``rank`` takes the first rows of the others' ``A``.
        """
        layer = self.layers[name]
        generator = generator_for(self.seed, "initial lora", name)
        A = (torch.rand(layer.rank, layer.n, generator=generator) * 2 - 1) / math.sqrt(layer.n)
        whole = self.transport.rounded(LowRank(torch.zeros(layer.m, layer.rank), A))
        return LowRank(whole.B[:, :rank], whole.A[:rank])
