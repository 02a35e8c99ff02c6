"""Packed transport at the server: changes of the LoRA and the head, and what coding has lost of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedsmoothlora.algebra.coding import Lazy, Packed, decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.federation import changes
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.transport import Transport
from fedsmoothlora.methods import Layer, Method, ServerUpdate


@dataclass
class ServerChanges:
    """The changes of packed transport at the server (`fedsmoothlora.federation.changes`).

    Attributes:
        method: the federated method.
        layers: the adapted layers, with the server's rank.
        transport: how factors travel.
        sent: the changes of the last rounds as they were sent, by round.
        left: what coding has lost of these changes so far, by name.
        behind: clients that gave no answer last. They are sent the LoRA and the head, not changes.
    """

    method: Method
    layers: Mapping[str, Layer]
    transport: Transport
    sent: dict[int, Coded] = field(default_factory=dict)
    left: dict[str, Tensor] = field(default_factory=dict)
    behind: set[str] = field(default_factory=set)

    def since(
        self, client: str, accepted: int, round: int, held: Callable[[], Mapping[str, Tensor]]
    ) -> Coded:
        """The changes that bring a client up to date; none where the LoRA and the head are no more bytes.

        Args:
            client: the client's id.
            accepted: the round of its last accepted upload, -1 if there is none.
            round: the round to come.
            held: gives the LoRA and the head that clients hold too.
        """
        if not self.transport.packs or accepted < 0 or client in self.behind:
            return {}
        rounds = range(accepted, round)
        if any(t not in self.sent for t in rounds):
            return {}
        found = {f"{t}:{key}": value for t in rounds for key, value in self.sent[t].items()}
        whole = sum(value.nbytes for value in held().values())
        return found if sum(value.nbytes for value in found.values()) < whole else {}

    def decoded(self, reply: Reply, held: Mapping[str, Tensor]) -> Reply:
        """A packed reply as methods and means read it: each tensor is decoded when it is read."""
        parts, sent = changes.sent_parts(self.method, reply.round), reply.sent

        def moved(key: str, change: LowRank | Tensor | Packed) -> Tensor:
            return held[key] + changes.received(change).to(held[key])

        def layer(name: str) -> LowRank | Tensor:
            keys = [changes.factor_key(name, part) for part in parts]
            factors = [moved(key, sent[key]) for key in keys]
            return LowRank(*factors) if len(factors) == 2 else factors[0]

        return replace(
            reply,
            sent=Lazy(self.layers, layer) if parts else decoded(sent),
            head=Lazy(reply.head, lambda name: moved(f"{changes.HEAD}{name}", reply.head[name])),
        )

    def broadcast(
        self, update: ServerUpdate, head: Mapping[str, Tensor], held: Mapping[str, Tensor], round: int
    ) -> tuple[ServerUpdate, dict[str, Tensor]]:
        """The LoRA and the head that clients will hold; their changes are kept in ``sent``.

        Args:
            update: the round's update as aggregated.
            head: the head as aggregated.
            held: the LoRA and the head before the round.
            round: the round.
        """
        parts = changes.sent_parts(self.method, round)
        lora: Coded = update.model or update.lora or {}
        after = {**(changes.factors(lora, parts) if parts else {}), **changes.under_head(head)}
        moved = {key: value - held[key] for key, value in after.items()}
        self.sent[round], self.left = changes.code_changes(moved, self.left, self.transport.bits)
        # More rounds than these are more bytes than the LoRA itself.
        for t in [t for t in self.sent if t <= round - 32 // self.transport.bits]:
            del self.sent[t]
        new = changes.added(held, self.sent[round])
        if parts and update.model:
            model = {
                name: LowRank(
                    new.get(changes.factor_key(name, "B"), product.B),
                    new.get(changes.factor_key(name, "A"), product.A),
                )
                for name, product in update.model.items()
            }
            update = replace(update, model=model)
        if parts and update.lora is not None:
            update = replace(update, lora=changes.as_update(new, self.layers, parts))
        return update, changes.head_of(new)
