"""The state of a client between rounds, and how a message of the server changes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.methods import Products, Update

# Before names of what a client's second exchange in a round needs.
PENDING = "pending:"


@dataclass(frozen=True)
class Segment:
    """The sum of server updates ``S^first ... S^{last-1}`` of one message."""

    first: int
    last: int
    updates: Products


@dataclass(frozen=True)
class ClientState:
    """The state of a client between rounds, sufficient for every message that the server may send next.

    A new upload does not replace the old one at once. The server's next message says which upload it accepted
    last, and an upload that was refused or lost must not be used for round matching. If a message is received
    twice (in a repeated round, or from a server that was restored from a checkpoint), the state is the same
    as after the first time.

    Attributes:
        uploads: the method's state of the client's recent uploads (``U_c``), by round.
        segments: the server's updates in the order in which they were received.
    """

    uploads: Mapping[int, Update] = field(default_factory=dict)
    segments: tuple[Segment, ...] = ()

    def after(self, message: Message) -> ClientState:
        """The state after a message: its updates are added, and everything that no round needs is removed."""
        # Updates that are sent again replace the old ones: a reply was lost, or the server was restored.
        segments = [segment for segment in self.segments if segment.last <= message.first_update]
        if message.first_update < message.round:
            news = {name: LowRank.of(update) for name, update in decoded(message.updates).items()}
            segments.append(Segment(message.first_update, message.round, news))
        return ClientState(
            uploads={
                round: without_pending(upload)
                for round, upload in self.uploads.items()
                if message.forget_before <= round < message.round
            },
            segments=tuple(segment for segment in segments if segment.last > message.forget_before),
        )

    def with_upload(self, round: int, kept: Update) -> ClientState:
        """The state with an upload added."""
        return ClientState(uploads={**self.uploads, round: kept}, segments=self.segments)

    def last_update(self, round: int) -> Products:
        """``S^{round-1}`` by layer, if the client received it alone; otherwise empty."""
        for segment in self.segments:
            if (segment.first, segment.last) == (round - 1, round):
                return segment.updates
        return {}

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


def without_pending(kept: Update) -> Update:
    """The part of an upload that a client keeps after its round is over."""
    if not any(name.startswith(PENDING) for name in kept):
        return kept
    return {name: value for name, value in kept.items() if not name.startswith(PENDING)}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with a prefix before their names, as they are part of ``ClientState.uploads``."""
    return {f"{prefix}{key}": value for key, value in tensors.items()}


def kept_under(prefix: str, kept: Update) -> dict[str, Tensor]:
    """The inverse of `under`: the tensors of a client's state that have the prefix."""
    return {
        key.removeprefix(prefix): value
        for key, value in kept.items()
        if key.startswith(prefix) and isinstance(value, Tensor)
    }
