"""Whether all values of a tensor are finite."""

from collections.abc import Iterable

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    The smallest and the largest value tell: NaN propagates to both. ``isfinite`` on every value would take
    ten times as long on the CPU, since it makes several tensors of that size.
    """
    if tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def are_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether each tensor has no value that is NaN or infinite, ``(tensors,)``, to be read at once.

    The result is on the device of the first tensor.
    """
    found: list[Tensor] = []
    for tensor in tensors:
        ends = torch.stack(torch.aminmax(tensor.detach())) if tensor.numel() else tensor.new_zeros(2)
        finite = torch.isfinite(ends).all()
        found.append(finite if not found else finite.to(found[0].device))
    return torch.stack(found)
