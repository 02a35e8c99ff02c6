"""Weighted tensors as integers that can be summed under a mask.

With weights ``w_c`` from 0 to 1, every site encodes the numbers ``w_c x_c``. The scale is public and the same
for all sites, so the sum of the integers is the sum of the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsmoothlora.errors import NotFiniteError

Words = NDArray[np.unsignedinteger[Any]]
"""Integers modulo ``2^16`` or ``2^32``, one dimension. NumPy's arithmetic on them wraps around."""

_TRAILING = 2  # the weight and the number of saturated numbers


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The decoded sum of the sites' integers.

    Attributes:
        tensors: ``sum_c w_c x_c / sum_c w_c``, float64, by name.
        weight: ``sum_c w_c``.
        saturated: how many numbers of all sites were larger than the bound and were cut to it.
    """

    tensors: Mapping[str, NDArray[np.float64]]
    weight: float
    saturated: int


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """A fixed-point code whose sums over all clients cannot overflow.

    A number ``x`` of a tensor with the bound ``beta`` is the integer ``round(w x L / beta)``, at most ``L``
    in absolute value, with ``L = floor((2^(bits-1) - 1) / clients)``. So the sum over all clients lies
    between ``-2^(bits-1)`` and ``2^(bits-1)``, and its residue modulo ``2^bits`` determines it. One step of a
    number is ``beta / L``, and the mean over clients with the weights ``w_c`` differs from the exact one by
    at most ``clients * beta / (2 L sum_c w_c)``.

    Attributes:
        shapes: the shape of every tensor, by name; all sites must have the same.
        bounds: the largest absolute value of a number of every tensor, by name. A larger number saturates.
        clients: the largest number of clients whose integers are added up.
        bits: size of an integer.
        least_weight: the smallest weight of a client. With 1, all weigh the same, and the weights in a sum
            are not read.
    """

    shapes: Mapping[str, Sequence[int]]
    bounds: Mapping[str, float]
    clients: int
    bits: Literal[16, 32] = 32
    least_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.clients < 1 or self.limit < 1:
            raise ValueError(
                f"{self.clients} clients in {self.bits} bits: there must be from 1 to {self._half}"
            )
        if self.shapes.keys() != self.bounds.keys():
            raise ValueError("shapes and bounds must name the same tensors")
        for name, bound in self.bounds.items():
            if not 0 < bound < math.inf:
                raise ValueError(f"tensor {name}: the bound is {bound:g}; it must be positive and finite")

    @property
    def limit(self) -> int:
        """``L``, the largest integer of one client."""
        return self._half // self.clients

    @property
    def rounding(self) -> float:
        """``sqrt(numbers) / (2 L)``, the largest norm of one client's rounding errors as a share of ``beta``.

        It holds for clients with the weight 1, and tensors with one bound.
        """
        return math.sqrt(sum(self._sizes().values())) / (2 * self.limit)

    @property
    def size(self) -> int:
        """How many integers a client sends."""
        return sum(self._sizes().values()) + _TRAILING

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The dtype of the integers, little-endian."""
        return np.dtype("<u2") if self.bits == 16 else np.dtype("<u4")

    def encode(self, tensors: Mapping[str, NDArray[np.floating]], weight: float) -> Words:
        """The integers of one client: its tensors in the order of ``shapes``, weight, and saturated numbers.

        The tensors are multiplied by the rounded weight, so that the rounding of the weight does not change
        the mean.

        Args:
            tensors: the tensors, by name.
            weight: ``w_c``, above 0 and at most 1.

        Raises:
            NotFiniteError: a number is not finite; the message names the tensor.
            ValueError: names, shapes or the weight are not valid.
        """
        share = round(weight * self.limit) if 0 < weight <= 1 else 0
        if share == 0:
            raise ValueError(f"the weight is {weight:g}; it must be from {1 / self.limit:g} to 1")
        if tensors.keys() != self.shapes.keys():
            raise ValueError(f"the tensors are {sorted(tensors)}; they must be {sorted(self.shapes)}")
        numbers, saturated = np.empty(self.size, np.int64), 0
        end = 0
        for name, size in self._sizes().items():
            tensor, bound = np.asarray(tensors[name], np.float64), self.bounds[name]
            if tensor.shape != tuple(self.shapes[name]):
                raise ValueError(
                    f"tensor {name} has the shape {tensor.shape}; it must be {tuple(self.shapes[name])}"
                )
            if not np.isfinite(tensor).all():
                raise NotFiniteError(f"tensor {name} has numbers that are not finite")
            saturated += int(np.count_nonzero(np.abs(tensor) > bound))
            start, end = end, end + size
            numbers[start:end] = np.rint(np.clip(tensor.ravel(), -bound, bound) / bound * share)
        numbers[end:] = share, min(saturated, self.limit)
        return numbers.astype(self.dtype)  # two's complement: the residue modulo 2^bits

    def decode(self, total: Words, summed: int) -> Mean:
        """The mean from the sum of the clients' integers.

        A client chooses the integer of its weight, so the sum of the weights is bounded by what ``summed``
        honest clients can have. A smaller one would magnify the sum of the others.

        Args:
            total: the sum.
            summed: the number of clients whose integers are in it.

        Raises ``ValueError`` if ``total`` cannot be such a sum.
        """
        if total.shape != (self.size,) or total.dtype != self.dtype:
            raise ValueError(
                f"the sum has {total.size} numbers of {total.dtype}; {self.size} of {self.dtype} are needed"
            )
        numbers = total.view(f"<i{self.bits // 8}").astype(np.int64)
        share, saturated = (int(number) for number in numbers[-_TRAILING:])
        least, most = summed * max(1, round(self.least_weight * self.limit)), summed * self.limit
        if least == most:
            share = most
        if not least <= share <= most:
            raise ValueError(
                f"the sum of the weights of {summed} sites is {share / self.limit:.6g}; it must be from "
                f"{least / self.limit:.6g} to {summed}"
            )
        tensors, end = {}, 0
        for name, size in self._sizes().items():
            start, end = end, end + size
            mean = numbers[start:end] / share * self.bounds[name]
            tensors[name] = mean.reshape(tuple(self.shapes[name]))
        # A negative count is a lie of a site; it must not end the run.
        return Mean(tensors=tensors, weight=share / self.limit, saturated=max(saturated, 0))

    @property
    def _half(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def _sizes(self) -> dict[str, int]:
        return {name: math.prod(shape) for name, shape in self.shapes.items()}
