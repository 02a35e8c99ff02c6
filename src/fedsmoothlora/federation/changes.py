"""The LoRA and the head that server and clients hold, sent as changes in few bits.

Methods that average factors keep a LoRA from round to round, and all methods keep a head that is trained
whole. With packed transport both sides send only how these differ from the last ones that both hold: factors
in integers of a few bits with one scale per direction, the head in bfloat16. Each sender adds to the next
change what coding has lost so far (error feedback, arXiv 1901.09847)::

    client   d_c = trained - held + e_c        sends code(d_c),  e_c = d_c - dec(code(d_c))
    server   d   = aggregated - held + e       sends code(d),    e   = d - dec(code(d)),  held += dec(code(d))

Everything here is a flat mapping of tensors: factors are ``LAYER.lora_B`` and ``LAYER.lora_A``, the head's
parameters ``head:NAME``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedsmoothlora.algebra.coding import Packed, code_factor, decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.methods import Layer, Method, Sent, Update

HEAD = "head:"
# Number format of the head's changes.
HEAD_NUMBERS = torch.bfloat16

_PARTS: Mapping[Sent, tuple[str, ...]] = {"product": ("B", "A"), "B": ("B",), "A": ("A",)}


def sent_parts(method: Method, round: int) -> tuple[str, ...]:
    """The factors that a method that averages factors sends in a round; none for other methods."""
    return _PARTS.get(method.sends(round), ()) if method.traits.averages_factors else ()


def shared_parts(method: Method) -> tuple[str, ...]:
    """The factors that server and clients hold in common."""
    found = {*sent_parts(method, 0), *sent_parts(method, 1)}
    return tuple(part for part in ("B", "A") if part in found)


def factor_key(layer: str, part: str) -> str:
    """The name of a layer's factor, as of SCAFFOLD's control variates."""
    return f"{layer}.lora_{part}"


def factors(update: Coded, parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The factors of an update: of products, or of layers whose value is the one factor of ``parts``."""
    found: dict[str, Tensor] = {}
    for name, value in decoded(update).items():
        for part in parts:
            found[factor_key(name, part)] = getattr(value, part) if isinstance(value, LowRank) else value
    return found


def as_update(held: Mapping[str, Tensor], layers: Mapping[str, Layer], parts: tuple[str, ...]) -> Update:
    """The inverse of `factors`: products where both factors are there, plain tensors otherwise."""
    if len(parts) == 2:
        return {name: LowRank(held[factor_key(name, "B")], held[factor_key(name, "A")]) for name in layers}
    return {name: held[factor_key(name, part)] for part in parts for name in layers}


def head_of(held: Coded) -> dict[str, Tensor]:
    """The head in a flat mapping, by parameter."""
    return {
        key.removeprefix(HEAD): value
        for key, value in held.items()
        if key.startswith(HEAD) and isinstance(value, Tensor)
    }


def under_head(head: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `head_of`."""
    return {f"{HEAD}{name}": value for name, value in head.items()}


def code_changes(
    changes: Mapping[str, Tensor], left: Mapping[str, Tensor], bits: int, clip_norm: float | None = None
) -> tuple[Coded, dict[str, Tensor]]:
    """Changes as they travel, and what coding left of them.

    Args:
        changes: the changes.
        left: what coding left of earlier ones, by the same names; 0 where it is missing.
        bits: bits of a factor's number.
        clip_norm: the largest norm of all changes together, with what is left of earlier ones; if they are
            longer, they are scaled down, and the rest is dropped. None does not clip.

    Raises:
        NotFiniteError: a factor is not finite.
    """
    coded: dict[str, Tensor | Packed] = {}
    remaining = dict(left)
    totals = {
        key: change + left[key].to(change) if key in left else change for key, change in changes.items()
    }
    if clip_norm is not None:
        norm = math.sqrt(math.fsum(float(one.double().square().sum()) for one in totals.values()))
        if norm > clip_norm:
            totals = {key: one * (clip_norm / norm) for key, one in totals.items()}
    for key, total in totals.items():
        if key.startswith(HEAD):
            coded[key] = total.to(HEAD_NUMBERS)
        else:
            coded[key] = code_factor(total, "B" if key.endswith("_B") else "A", bits)
        remaining[key] = total - received(coded[key]).to(total)
    return coded, remaining


def received(change: LowRank | Tensor | Packed) -> Tensor:
    """A change as its receiver adds it."""
    value = change.decoded() if isinstance(change, Packed) else change
    assert isinstance(value, Tensor)
    return value.to(torch.float32)


def added(held: Mapping[str, Tensor], changes: Coded) -> dict[str, Tensor]:
    """``held`` with changes added."""
    return {
        key: value + received(changes[key]).to(value) if key in changes else value
        for key, value in held.items()
    }
