"""The clients' part of a round in a shared subspace: what they keep between its two exchanges.

Between the exchanges a client keeps ``M_c`` and the head's change, with the attempt of the round. It keeps
them until its next round, so a message that is sent again has the same answer. ``P_t`` is kept with the
upload: the next message then needs ``R_t`` only, from which the client computes ``S^t = P_t R_t^T``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.errors import LostStateError
from fedsmoothlora.federation.changes import HEAD, head_of, under_head
from fedsmoothlora.federation.client_state import PENDING, ClientState, kept_under, under
from fedsmoothlora.federation.devices import SERVER, placed
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.methods import Update

# Before the names of the left factors that a client received in the round of an upload.
_LEFT = "subspace left:"


def pending(
    changes: Update, head: Mapping[str, Tensor], head_before: Mapping[str, Tensor], attempt: int
) -> dict[str, LowRank | Tensor]:
    """The state that a client keeps for its second exchange.

    Args:
        changes: ``M_c``, by layer.
        head: the trained head; empty if none is shared.
        head_before: the head at the start of the round.
        attempt: how often the round was repeated.
    """
    moved = {name: value.float() - head_before[name].to(value.device).float() for name, value in head.items()}
    return {f"{PENDING}{attempt}:{name}": value for name, value in {**changes, **under_head(moved)}.items()}


def pending_in(state: ClientState, message: Message) -> tuple[dict[str, LowRank | Tensor], dict[str, Tensor]]:
    """The inverse of `pending`, for the round and the attempt of a message.

    Raises ``LostStateError`` if the client has nothing pending.
    """
    prefix = f"{PENDING}{message.attempt}:"
    kept = state.uploads.get(message.round, {})
    found = {name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)}
    changes = {name: value for name, value in found.items() if not name.startswith(HEAD)}
    if changes.keys() != message.left.keys():
        raise LostStateError("what it trained before the second exchange of this round is gone")
    return changes, head_of(found)


def left_of(message: Message) -> dict[str, Tensor]:
    """``P_t`` as the client keeps it with its upload."""
    return under(_LEFT, placed(message.left, SERVER))


def completed(message: Message, state: ClientState) -> Message | None:
    """The message with the whole last update, where it has ``R_{t-1}`` only.

    None if the client has lost ``P_{t-1}``.
    """
    if not message.right:
        return message
    left = kept_under(_LEFT, state.uploads.get(message.round - 1, {}))
    if left.keys() != message.right.keys():
        return None
    updates = {name: LowRank(left[name], right) for name, right in message.right.items()}
    return replace(message, updates=updates, right={})
