"""Uploads that began in an earlier round, in asynchronous rounds (FedBuff, arXiv 2106.06639).

A client began in round ``tau``, and its upload ``u`` arrives in round ``t``. With the baseline ``b^t``, the
upload of a client that begins in round ``t`` and changes nothing, it counts as::

    u' = b^t + w(t - tau) (u - b^tau)

FedBuff adds the mean of the weighted changes to the global model: ``W^{t+1} = W^t + sum_c p_c w(k_c) D_c``,
with the change ``D_c`` since the model from which client ``c`` began. For methods that merge products,
``b = 0``, so ``u' = w u``. For methods that keep a LoRA, ``b`` is that LoRA. Everything before and after the
average then works as in a synchronous round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsmoothlora.algebra.coding import Lazy, decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.methods import Update


@dataclass(frozen=True)
class Baseline:
    """The reply of a client that began in a round and changed nothing.

    Attributes:
        sent: the upload (`Method.unchanged`); layers that are missing are 0.
        head: the head that was sent down, if heads are shared.
    """

    sent: Update
    head: Mapping[str, Tensor]


@dataclass(frozen=True)
class InFlight:
    """The clients that train while a round ends.

    Attributes:
        time: the simulated time.
        clients: the time at which each one finishes, its id, and the round in which it began.
    """

    time: float = 0.0
    clients: tuple[tuple[float, str, int], ...] = ()


def rebased(reply: Reply, then: Baseline, now: Baseline, weight: float, *, apart: bool) -> Reply:
    """The reply of a client that begins now and makes ``weight`` times the change of ``reply``.

    Args:
        reply: a decoded reply.
        then: the baseline of the round in which it began.
        now: the baseline of this round.
        weight: the weight of the change.
        apart: the factors of a product change each by itself, as in methods that average them apart.
    """
    sent = decoded(reply.sent)

    def layer(name: str) -> LowRank | Tensor:
        value, old, new = sent[name], then.sent.get(name), now.sent.get(name)
        if not isinstance(value, LowRank):
            assert not isinstance(old, LowRank)
            assert not isinstance(new, LowRank)
            return _moved(value, old, new, weight)
        assert not isinstance(old, Tensor)
        assert not isinstance(new, Tensor)
        value = value.to(dtype=_dtype(value.B))
        if not apart:
            change = value if old is None else value - old
            return weight * change if new is None else new + weight * change
        return LowRank(
            _moved(value.B, None if old is None else old.B, None if new is None else new.B, weight),
            _moved(value.A, None if old is None else old.A, None if new is None else new.A, weight),
        )

    def head(name: str) -> Tensor:
        value = reply.head[name]
        return _moved(value, then.head[name], now.head[name], weight).to(value.dtype)

    return replace(reply, sent=Lazy(sent, layer), head=Lazy(reply.head, head))


def _moved(value: Tensor, old: Tensor | None, new: Tensor | None, weight: float) -> Tensor:
    """``new + weight (value - old)``; 0 for what is None."""
    value = value.to(_dtype(value))
    change = weight * (value if old is None else value - old.to(value))
    return change if new is None else new.to(value) + change


def _dtype(value: Tensor) -> torch.dtype:
    """The dtype of a change: at least float32."""
    return torch.promote_types(value.dtype, torch.float32)
