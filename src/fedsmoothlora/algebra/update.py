"""Updates of the adapted layers, as methods, server and clients exchange them.

Importing this module imports no torch, so that settings and method files can use its names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from fedsmoothlora.algebra.coding import Packed
    from fedsmoothlora.algebra.lowrank import LowRank

    # By layer: a low-rank product, or a plain tensor (one factor, or a full weight matrix).
    Update = Mapping[str, LowRank | Tensor]
    # By layer: a low-rank product.
    Products = Mapping[str, LowRank]
    # An update as it travels: its products and factors may be packed.
    Coded = Mapping[str, LowRank | Tensor | Packed]
else:
    Update = Mapping[str, Any]
    Products = Mapping[str, Any]
    Coded = Mapping[str, Any]

# The trained part of a layer: LoRA's factors, the matrix ``R`` of ``B R A``, or the weight itself.
Part = Literal["B", "A", "R", "W"]
# The uploaded part of a layer.
Sent = Literal["product", "B", "A", "R", "W", "nothing"]
# The division of singular values between factors: their square roots on both sides, or all of them on B.
Balance = Literal["sqrt", "left"]


@dataclass(frozen=True)
class Layer:
    """One adapted linear layer: weight ``(m, n)`` = (out, in features), LoRA rank, scale ``s``.

    ``gradient_rank`` is the highest rank that the layer's gradient can have: ``min(m, n)``, or for a softmax
    head at most the number of classes minus one, because the rows of its gradient sum to zero.
    """

    name: str
    m: int
    n: int
    rank: int
    scale: float
    gradient_rank: int
