"""The state of a client between rounds, and its change by a message of the server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.methods import Products, Update


@dataclass(frozen=True)
class Segment:
    """The sum of server updates ``S^first ... S^{last-1}``, as one message brought it."""

    first: int
    last: int
    updates: Products


@dataclass(frozen=True)
class ClientState:
    """The state of a client between rounds. It suffices for every message that the server may send next.

    A new upload never replaces the old one at once: the server's next message says which round it last
    accepted, and an upload that was refused or lost is not the one to match. The same message may come
    twice (a repeated round, a server that went back to a checkpoint); the state after it is the same.

    Attributes:
        uploads: what the method keeps of the client's recent uploads (``U_c``), by round.
        segments: the server's updates as they came, in order.
    """

    uploads: Mapping[int, Update] = field(default_factory=dict)
    segments: tuple[Segment, ...] = ()

    def after(self, message: Message) -> ClientState:
        """The state once the client has read ``message``: what it brought is in, what is over is out."""
        # Updates that the message brings again were not confirmed: a reply was lost, or the server went back.
        segments = [segment for segment in self.segments if segment.last <= message.first_update]
        if message.first_update < message.round:
            news = {name: LowRank.of(update) for name, update in decoded(message.updates).items()}
            segments.append(Segment(message.first_update, message.round, news))
        return ClientState(
            uploads={
                round: upload
                for round, upload in self.uploads.items()
                if message.forget_before <= round < message.round
            },
            segments=tuple(segment for segment in segments if segment.last > message.forget_before),
        )

    def with_upload(self, round: int, kept: Update) -> ClientState:
        """The state after an upload."""
        return ClientState(uploads={**self.uploads, round: kept}, segments=self.segments)

    def received_since(self, round: int, until: int) -> Products | None:
        """``S^round + ... + S^{until-1}`` by layer; None if an update is missing."""
        total: dict[str, LowRank] = {}
        reached = round
        for segment in self.segments:
            if segment.last <= round:
                continue
            if segment.first != reached:
                return None
            reached = segment.last
            for name, update in segment.updates.items():
                total[name] = total[name] + update if name in total else update
        return total if reached == until else None
