"""The result of one client's round."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedsmoothlora.federation.client_state import ClientState
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.personal import GlobalModel
from fedsmoothlora.methods import Products


@dataclass(frozen=True, kw_only=True)
class Visit:
    """The result of one client's round.

    Attributes:
        reply: the reply to the server.
        state: the state that stays at the client.
        start: the start of local training relative to ``W^t``, divided by ``s``, by layer; empty unless
            ``evaluation.diagnostics`` is set.
        at: the global model at the start of the round, if the client trains a personal model in this round.
    """

    reply: Reply
    state: ClientState
    start: Products = field(default_factory=dict)
    at: GlobalModel | None = None
