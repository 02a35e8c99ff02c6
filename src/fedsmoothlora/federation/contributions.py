"""Sums of uploads: all that the server uses of a round in a shared subspace or with secure aggregation.

A client sends named tensors that are multiplied by its weight, and the weight. The server adds them up and
divides by the sum of the weights. It reads no single contribution after the checks, so secure aggregation
(`fedsmoothlora.federation.masked`) takes the place of `summed`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsmoothlora.federation.changes import HEAD, head_of, under_head
from fedsmoothlora.federation.messages import Reply


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """A client's part of a sum, or the sum of several.

    Attributes:
        weight: ``w_c``, or its sum.
        tensors: ``w_c x_c`` by name, or their sums: of a layer by its name, of the head's change with
            ``head:`` before it.
        rounding: the norm of the rounding error of one client's tensors, as a share of their largest number
            (`FixedPoint.rounding`); 0 for sums of floats.
    """

    weight: float
    tensors: Mapping[str, Tensor]
    rounding: float = 0.0

    @classmethod
    def of(cls, reply: Reply) -> Contribution:
        """The contribution of a checked reply, whose tensors the client has multiplied by its weight."""
        tensors = {name: value for name, value in reply.sent.items() if isinstance(value, Tensor)}
        return cls(weight=reply.samples, tensors={**tensors, **under_head(dict(reply.head))})

    def means(self) -> dict[str, Tensor]:
        """``sum_c w_c x_c / sum_c w_c`` by layer, without the head."""
        return {name: self._mean(value) for name, value in self.tensors.items() if not name.startswith(HEAD)}

    def moved_head(self, head: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The head after the mean of the clients' changes."""
        changes = head_of(self.tensors)
        return {
            name: (value.double() + self._mean(changes[name]).double()).to(value.dtype)
            for name, value in head.items()
        }

    def _mean(self, total: Tensor) -> Tensor:
        return (total / self.weight).float()


def summed(contributions: Iterable[Contribution]) -> Contribution:
    """The sum in float64, in the given order. Raises ``ValueError`` if there is no contribution."""
    tensors: dict[str, Tensor] = {}
    weight = 0.0
    for one in contributions:
        weight += one.weight
        for name, value in one.tensors.items():
            if name in tensors:
                tensors[name] += value
            else:
                tensors[name] = value.to(torch.float64, copy=True)
    if not weight:
        raise ValueError("a sum without contributions has no weights")
    return Contribution(weight=weight, tensors=tensors)


def weighted(tensors: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
    """``w_c x_c`` by name, in float32."""
    return {name: weight * value.float() for name, value in tensors.items()}
