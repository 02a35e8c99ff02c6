"""Packed transport at a client: changes of the LoRA and the head, and what coding has lost of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.errors import LostStateError
from fedsmoothlora.federation import changes
from fedsmoothlora.federation.client_state import kept_under, under
from fedsmoothlora.federation.devices import SERVER, placed
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.transport import Transport
from fedsmoothlora.methods import ClientView, Method, Update, Upload

# Before names in a client's state: the LoRA and the head that the server had at the start of the round, and
# what coding has lost of the changes that the client sent.
_HELD, _LEFT = "held:", "left:"


@dataclass(frozen=True)
class ClientChanges:
    """The changes of packed transport at a client (`fedsmoothlora.federation.changes`).

    With 32 and 16 bits nothing is sent as a change: `held` is empty, and `coded` only converts numbers.

    Attributes:
        method: the federated method.
        transport: how factors travel.
        clip_norm: the norm to which a change is scaled down before it is coded, as the server will clip what
            it receives; the part that clipping removes is not sent later. None does not clip.
    """

    method: Method
    transport: Transport
    clip_norm: float | None = None

    def held(self, view: ClientView, message: Message) -> dict[str, Tensor]:
        """The LoRA and the head that server and client have in common at the start of the round, on the CPU.

        Raises ``LostStateError`` if the message brings only changes and the client has lost their base.
        """
        if not self.transport.packs:
            return {}
        if not message.changes:
            parts = changes.shared_parts(self.method)
            lora = decoded(message.lora) or {name: view.initial(name) for name in view.layers}
            head = changes.under_head(message.head) if self.method.traits.shares_head else {}
            return placed({**(changes.factors(lora, parts) if parts else {}), **head}, SERVER)
        held = placed(kept_under(_HELD, view.kept), SERVER)
        for t in range(message.accepted_round, message.round):
            change = {
                key.removeprefix(f"{t}:"): value
                for key, value in message.changes.items()
                if key.startswith(f"{t}:")
            }
            if change.keys() - held.keys():
                raise LostStateError("the LoRA or the head that the server's changes belong to is gone")
            held = changes.added(held, change)
        return held

    def lora(self, view: ClientView, message: Message, held: Mapping[str, Tensor]) -> Update:
        """The LoRA that the server sent, from the changes if it sent those."""
        parts = changes.shared_parts(self.method) if self.transport.packs else ()
        return changes.as_update(held, view.layers, parts) if parts else decoded(message.lora)

    def coded(
        self, upload: Upload, head: dict[str, Tensor], view: ClientView, held: Mapping[str, Tensor]
    ) -> tuple[Coded, dict[str, Tensor], dict[str, Tensor]]:
        """The upload and the head in the format of the wire, and the state that later changes need.

        Raises ``NotFiniteError`` if a factor is not finite.
        """
        if not self.transport.packs:
            return self.transport.coded(upload.sent), head, {}  # the client keeps its own upload uncoded
        parts = changes.sent_parts(self.method, view.round)
        trained = {**(changes.factors(upload.sent, parts) if parts else {}), **changes.under_head(head)}
        feeds_back = self.method.traits.averages_factors or self.method.clients_feed_back
        coded, left = changes.code_changes(
            {key: value.to(SERVER) - held[key] for key, value in trained.items()},
            kept_under(_LEFT, view.kept) if feeds_back else {},
            self.transport.bits,
            self.clip_norm if parts else None,  # a product is not among these changes
        )
        sent = {key: value for key, value in coded.items() if not key.startswith(changes.HEAD)}
        state = under(_HELD, held) | (under(_LEFT, left) if feeds_back else {})
        return sent if parts else self.transport.coded(upload.sent), changes.head_of(coded), state
