"""Local training: nothing is shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedsmoothlora.algebra.update import Sent, Update
from fedsmoothlora.methods.base import (
    ClientView,
    Family,
    Method,
    ServerUpdate,
    ServerView,
    Start,
    Traits,
    Upload,
)


@dataclass(frozen=True, kw_only=True)
class Local(Method):
    """No communication: every client trains its own LoRA on its own data, as a lower bound for comparisons.

    There is no global model: global metrics are means of the clients' models.
    """

    name: ClassVar[str] = "local"
    family: ClassVar[Family] = "personal"
    traits: ClassVar[Traits] = Traits(
        client_ranks=True,
        global_model=False,
        shares_head=False,
        step_on=None,
        no_step_reason="its server averages nothing",
        no_robust_reason="its server averages nothing",
        no_async_reason="its server averages nothing, so that there is nothing to wait for",
        no_privacy_reason="nothing leaves its clients that could be made private",
        no_sum_reason="it sends nothing",
        float32_reason="it sends nothing",
    )
    numbers_down: ClassVar[str] = "0"
    limitation: ClassVar[str] = "clients learn nothing from each other"

    def sends(self, round: int) -> Sent:
        """Nothing."""
        return "nothing"

    def start(self, client: ClientView) -> Start:
        """The client's own last factors; in round 0 PEFT's initialisation."""
        from fedsmoothlora.algebra.averaging import products

        own = products({name: client.kept[name] for name in client.layers if name in client.kept})
        return Start(lora=own or {name: client.initial(name) for name in client.layers})

    def upload(self, trained: Update, start: Start, client: ClientView) -> Upload:
        """Nothing; the client keeps its factors."""
        return Upload(sent={}, kept=trained)

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """Nothing."""
        return ServerUpdate()
