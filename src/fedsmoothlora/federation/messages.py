"""The messages of a round: one `Message` from the server to each client, one `Reply` back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedsmoothlora.algebra.coding import Packed
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.modeling.memmap import memmapped_update


@dataclass(frozen=True, kw_only=True)
class Message:
    """The server's message to a client at the start of a round.

    Attributes:
        experiment: the run's identity, to which a client's state and uploads belong.
        round: ``t``, counted from 0.
        attempt: how often this round was begun before; part of every seed.
        exchange: 1 for the second exchange of a round in a shared subspace, otherwise 0.
        accepted_round: the last round whose upload by this client counted; -1 if none did.
        forget_before: uploads from rounds before this one will not be asked for again, even if the server
            goes back to its oldest checkpoint.
        first_update: ``updates`` sums ``S^first_update ... S^{t-1}``, what the client has not confirmed yet.
        updates: that sum, by layer, as a low-rank product or dense, whichever is smaller.
        lora: the LoRA from which methods that keep one start.
        head: the head's parameters where it is trained whole.
        changes: in place of both, with packed transport: the changes of rounds ``accepted_round ... t-1``, as
            ``ROUND:LAYER.lora_B``, ``ROUND:LAYER.lora_A`` and ``ROUND:head:NAME``.
        control: SCAFFOLD's ``c``, by trained parameter; what is missing is 0.
        gradients: what the method gives this client of the gradients that clients sent ahead of the round.
        basis: ``Q_t (n, r)`` of the shared subspace, by layer, where the client does not compute it itself.
        left: ``P_t (m, r)``, in the second exchange.
        right: ``R_{t-1}^T (r, n)``, in place of ``updates``, for a client that holds ``P_{t-1}``.
        personal: 1 after the federation, to ask for the metrics of the client's personal models in place of
            those of the global model.
    """

    experiment: str = ""
    round: int
    attempt: int = 0
    exchange: int = 0
    accepted_round: int = -1
    forget_before: int = -1
    first_update: int = 0
    updates: Coded = field(default_factory=dict)
    lora: Coded = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    changes: Coded = field(default_factory=dict)
    control: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    basis: Mapping[str, Tensor] = field(default_factory=dict)
    left: Mapping[str, Tensor] = field(default_factory=dict)
    right: Mapping[str, Tensor] = field(default_factory=dict)
    personal: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        parts: tuple[Coded, ...] = (
            *(self.updates, self.lora, self.head, self.changes, self.control, self.gradients),
            *(self.basis, self.left, self.right),
        )
        return sum(_nbytes(part) for part in parts)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A client's reply to the server after local training.

    Attributes:
        client: who sends it.
        experiment: the message's.
        round: the message's round.
        attempt: the message's attempt.
        exchange: the message's exchange.
        samples: the client's number of training samples, from which its weight ``p_c`` follows; 1 if it is
            private.
        sent: the method's upload; with packed transport, of methods that average factors, the changes of the
            factors, as ``LAYER.lora_B`` and ``LAYER.lora_A``; in a shared subspace, plain tensors multiplied
            by ``samples``.
        head: the head's trained parameters where it is trained whole; with packed transport, their changes;
            in the second exchange of a shared subspace, their changes multiplied by ``samples``.
        control: by how much SCAFFOLD's ``c_i`` changed, by trained parameter.
        metrics: numbers to record, by name.
    """

    client: str
    experiment: str = ""
    round: int
    attempt: int = 0
    exchange: int = 0
    samples: int
    sent: Coded
    head: Mapping[str, Tensor] = field(default_factory=dict)
    control: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of the reply's tensors in bytes."""
        return _nbytes(self.sent) + _nbytes(self.head) + _nbytes(self.control)


def _nbytes(tensors: Coded) -> int:
    return sum(value.nbytes for value in tensors.values())


def memmapped_reply(reply: Reply) -> Reply:
    """The reply with its tensors in a memory-mapped file, so that many replies can wait for the round's end.

    A reply with values that are not tensors or products is returned unchanged.
    """
    parts = {part: getattr(reply, part) for part in ("sent", "head", "control")}
    for part, update in parts.items():
        if not isinstance(update, Mapping):
            return reply
        for value in update.values():
            product = part == "sent" and isinstance(value, LowRank | Packed)
            if not product and not (isinstance(value, Tensor) and value.layout == torch.strided):
                return reply
    mapped: dict[str, Any] = {part: memmapped_update(update) for part, update in parts.items()}
    return replace(reply, **mapped)
