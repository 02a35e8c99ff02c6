"""The messages of a round: one `Message` from the server to each client, one `Reply` back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.methods import Update
from fedsmoothlora.modeling.memmap import memmapped_update


@dataclass(frozen=True, kw_only=True)
class Message:
    """The server's message to a client at the start of a round.

    Attributes:
        experiment: the run's identity, to which a client's state and uploads belong.
        round: ``t``, counted from 0.
        attempt: number of earlier attempts of this round; part of every seed.
        accepted_round: the last round in which this client's upload was accepted; -1 if there is none.
        forget_before: the client may delete uploads from earlier rounds than this; the server does not need
            them even if it is restored from its oldest checkpoint.
        first_update: the first server update that the client has not confirmed.
        updates: the sum ``S^first_update + ... + S^{t-1}``, by layer, as a low-rank product or dense,
            whichever is smaller.
        lora: the LoRA from which the client starts, if the method keeps one.
        head: the parameters of a fully trained head.
        control: SCAFFOLD's ``c``, by trained parameter; missing entries count as 0.
        gradients: the gradients for this client, if the method exchanges gradients.
    """

    experiment: str = ""
    round: int
    attempt: int = 0
    accepted_round: int = -1
    forget_before: int = -1
    first_update: int = 0
    updates: Update = field(default_factory=dict)
    lora: Update = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    control: Mapping[str, Tensor] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of the message's tensors in bytes."""
        parts = (self.updates, self.lora, self.head, self.control, self.gradients)
        return sum(_nbytes(part) for part in parts)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A client's reply to the server after local training.

    Attributes:
        client: the client's id.
        experiment: the ``experiment`` of the message.
        round: the ``round`` of the message.
        attempt: the ``attempt`` of the message.
        samples: the client's number of training samples, to which its weight ``p_c`` is proportional.
        sent: the method's upload.
        head: the trained parameters of a fully trained head.
        control: the change of SCAFFOLD's ``c_i``, by trained parameter.
        metrics: numbers to record, by name.
    """

    client: str
    experiment: str = ""
    round: int
    attempt: int = 0
    samples: int
    sent: Update
    head: Mapping[str, Tensor] = field(default_factory=dict)
    control: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of the reply's tensors in bytes."""
        return _nbytes(self.sent) + _nbytes(self.head) + _nbytes(self.control)


def _nbytes(tensors: Update) -> int:
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
            product = part == "sent" and isinstance(value, LowRank)
            if not product and not (isinstance(value, Tensor) and value.layout == torch.strided):
                return reply
    mapped: dict[str, Any] = {part: memmapped_update(update) for part, update in parts.items()}
    return replace(reply, **mapped)
