"""Weighted means over clients, always summed in client order so that arrival order changes nothing."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedsmoothlora.lowrank import LowRank


def client_weights(counts: Sequence[float]) -> list[float]:
    """Client weights ``p_c = counts_c / sum(counts)``; ``counts`` are training samples.

    Raises ``ValueError`` if there are none, one is negative or not finite, or all are 0.
    """
    total = math.fsum(counts)
    if not counts or not math.isfinite(total) or min(counts) < 0 or total == 0:
        raise ValueError(
            f"client weights must be finite, at least 0 and not all 0; got {list(counts)} (samples a client)"
        )
    return [count / total for count in counts]


def mean_tensor(tensors: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    """``sum_c p_c x_c`` in the given order, accumulated in float32 or better, in the tensors' dtype.

    Raises ``ValueError`` as ``client_weights``, and if shapes or numbers differ.
    """
    weights = client_weights(counts)
    if len(tensors) != len(weights) or len({tensor.shape for tensor in tensors}) != 1:
        raise ValueError(
            f"cannot average tensors of shapes {[tuple(t.shape) for t in tensors]} "
            f"with {len(weights)} weights"
        )
    dtype = tensors[0].dtype
    total = torch.zeros_like(tensors[0], dtype=torch.promote_types(dtype, torch.float32))
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total.to(dtype)


def products_of(uploads: Sequence[Mapping[str, LowRank | Tensor]], name: str) -> list[LowRank]:
    """One layer's product of every upload.

    Raises ``TypeError`` where an upload holds a plain tensor for that layer.
    """
    products = [upload[name] for upload in uploads]
    for product in products:
        if not isinstance(product, LowRank):
            raise TypeError(f"layer {name}: expected a low-rank product; got {type(product).__name__}")
    return products  # type: ignore[return-value]
