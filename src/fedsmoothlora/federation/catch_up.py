"""The updates that a returning client has missed, summed in the form with the fewest bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedsmoothlora.algebra.coding import Packed, unpacked
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.methods import Layer

# Relative singular values up to this are directions that rounding added to a sum.
_ROUNDING = 8 * torch.finfo(torch.float32).eps


def catch_up(updates: Iterable[Coded], layers: Mapping[str, Layer]) -> Coded:
    """The sum of server updates in the smallest of three forms, layer by layer.

    As they are (their factors side by side: ``sum of ranks * (m + n)`` numbers), exactly compressed
    (``rank of the sum * (m + n)``, float32), or dense (``m n``, float32). One update is in memory at a time,
    and of the sum no more than a few such matrices, however many there are. Packed updates stay packed until
    they are more bytes than the dense matrix.
    """
    total: dict[str, LowRank | Tensor] = {}
    packed: dict[str, list[Packed]] = {}
    terms: Counter[str] = Counter()
    for update in updates:
        for name, value in update.items():
            if isinstance(value, Packed) and name not in total:
                collected = packed.setdefault(name, [])
                collected.append(value)
                if sum(one.nbytes for one in collected) > 4 * layers[name].m * layers[name].n:
                    total[name] = LowRank.of(unpacked(Packed.joined(packed.pop(name)))).dense()
                continue
            plain = unpacked(value)
            total[name] = _beside(total[name], plain) if name in total else plain
            terms[name] += 1
    found: dict[str, LowRank | Tensor | Packed] = {}
    for name, layer in layers.items():
        if name in packed:
            found[name] = Packed.joined(packed[name])
        elif name in total:
            found[name] = _smallest(total[name], layer, summed=terms[name] > 1)
    return found


def _beside(total: LowRank | Tensor, value: LowRank | Tensor) -> LowRank | Tensor:
    """The sum of both: dense if one is, otherwise concatenated factors, compressed if there are too many."""
    if isinstance(total, Tensor) or isinstance(value, Tensor):
        one, other = (part.dense() if isinstance(part, LowRank) else part for part in (total, value))
        return one + other
    # Factors keep their own dtype: they are only concatenated, so nothing is rounded.
    dtype = torch.promote_types(total.dtype, value.dtype)
    both = [part.to(dtype=dtype) for part in (total, value)]
    whole = LowRank(torch.cat([part.B for part in both], dim=1), torch.cat([part.A for part in both]))
    return whole.truncate(None, tolerance=_ROUNDING) if whole.rank > 2 * min(whole.shape) else whole


def _smallest(total: LowRank | Tensor, layer: Layer, *, summed: bool) -> LowRank | Tensor:
    """The sum in the form that has the fewest bytes."""
    if isinstance(total, Tensor):
        return total
    forms = [total]
    if summed:  # updates may share directions, or have more of them than the layer
        forms.append(total.truncate(None, tolerance=_ROUNDING))
    smallest = min(forms, key=lambda form: form.nbytes)
    return total.dense() if 4 * layer.m * layer.n < smallest.nbytes else smallest
