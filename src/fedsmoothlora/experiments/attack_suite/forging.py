"""Change honest replies: arithmetic on uploads, and the engine that sends the changed replies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedsmoothlora.algebra.coding import Packed, unpacked
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.experiments.attacks.base import UploadAttack
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.simulation import ClientReply, Engine, Simulation
from fedsmoothlora.tasks.objectives import Evaluation


def times(value: LowRank | Tensor | Packed, factor: float) -> LowRank | Tensor:
    """A layer's upload times a number, of the same dtype."""
    return unpacked(value) * factor


def norm_of(value: LowRank | Tensor | Packed) -> float:
    """The Frobenius norm of a layer's upload."""
    value = unpacked(value)
    return value.norm() if isinstance(value, LowRank) else float(torch.linalg.vector_norm(value.double()))


def scaled(reply: Reply, message: Message, factor: float) -> Reply:
    """The upload, and the change of the head from the one sent down, times a number."""
    head = {
        name: (sent := message.head[name].to(value)) + factor * (value - sent)
        for name, value in reply.head.items()
    }
    return replace(reply, sent={name: times(value, factor) for name, value in reply.sent.items()}, head=head)


@dataclass(frozen=True, kw_only=True)
class ForgingEngine:
    """Another engine, with the replies of malicious clients changed after their training.

    Attributes:
        engine: runs the clients.
        attack: changes the replies.
        malicious: the malicious clients.
    """

    engine: Engine
    attack: UploadAttack
    malicious: Collection[str]

    @property
    def in_turn(self) -> bool:
        """As of the other engine."""
        return self.engine.in_turn

    def train(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterator[ClientReply]:
        """Train all clients honestly, and replace the replies of the malicious ones."""
        sent: dict[str, Message] = {}

        def remembered(client: str) -> Message:
            made = message(client)
            if client in self.malicious:
                sent[client] = made
            return made

        for answer in self.engine.train(simulation, clients, remembered, callback):
            if answer.client in self.malicious:
                forged = self.attack.forged(answer.reply, sent.pop(answer.client), simulation.server.layers)
                answer = replace(answer, reply=forged)
            yield answer

    def calibrate(
        self,
        simulation: Simulation,
        clients: Sequence[str],
        message: Callable[[str], Message],
        callback: Callback,
    ) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """The honest gradients of all clients."""
        yield from self.engine.calibrate(simulation, clients, message, callback)

    def validate(
        self, simulation: Simulation, message: Callable[[str], Message], callback: Callback
    ) -> Mapping[str, Evaluation]:
        """As the other engine."""
        return self.engine.validate(simulation, message, callback)

    def personal(
        self, simulation: Simulation, message: Callable[[str], Message], callback: Callback
    ) -> Mapping[str, Mapping[str, float]]:
        """As the other engine."""
        return self.engine.personal(simulation, message, callback)
