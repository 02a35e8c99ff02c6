"""RoLoRA: rounds train ``B`` and ``A`` in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedsmoothlora.algebra.update import Sent, Update
from fedsmoothlora.errors import LostStateError
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
class RoLoRA(Method):
    """RoLoRA (arXiv 2502.01755): rounds 0, 2, 4 ... train and average ``B``, rounds 1, 3 ... ``A``, exactly.

    In each round one factor is the same at all clients, so the product with the mean of the other factor is
    the mean of products. ``B`` is trained first, because it starts at 0, where the gradient of ``A`` is 0.
    """

    name: ClassVar[str] = "rolora"
    family: ClassVar[Family] = "exact"
    traits: ClassVar[Traits] = Traits(
        averages_factors=True,
        step_on="factors",
        uses_mean_only=True,
        sums_tensors=True,
        no_async_reason=(
            "rounds train B and A in turn, and an upload of B would arrive in a round that averages A"
        ),
    )
    numbers_down: ClassVar[str] = "r*n / r*m"
    limitation: ClassVar[str] = "only one factor is trained in a round"

    def sends(self, round: int) -> Sent:
        """The factor of the round."""
        return _factor(round)

    def start(self, client: ClientView) -> Start:
        """The server's factors; a client of the last round was sent only the factor that was trained then."""
        from torch import Tensor

        from fedsmoothlora.algebra.lowrank import LowRank

        lora = {}
        for name in client.layers:
            sent, other = client.server_lora.get(name), client.kept.get(name)
            if sent is None:
                lora[name] = client.initial(name)
            elif isinstance(sent, LowRank):
                lora[name] = sent
            else:
                if not isinstance(other, Tensor):
                    raise LostStateError(
                        f"the factor of layer {name} that the client should have kept is lost"
                    )
                is_B = _factor(client.round - 1) == "B"
                lora[name] = LowRank(sent, other) if is_B else LowRank(other, sent)
        return Start(lora=lora, trains=(_factor(client.round),))

    def upload(self, trained: Update, start: Start, client: ClientView) -> Upload:
        """The trained factor; the client keeps the other one, which is not sent again."""
        from fedsmoothlora.algebra.averaging import products

        sent, kept = {}, {}
        for name, product in products(trained).items():
            is_B = _factor(client.round) == "B"
            sent[name], kept[name] = (product.B, product.A) if is_B else (product.A, product.B)
        return Upload(sent=sent, kept=kept)

    def aggregate(
        self, uploads: Sequence[Update], weights: Sequence[float], server: ServerView
    ) -> ServerUpdate:
        """The mean of the round's factor; the other factor is unchanged."""
        from fedsmoothlora.algebra.averaging import mean_part
        from fedsmoothlora.algebra.lowrank import LowRank

        means = {name: mean_part(uploads, weights, name) for name in server.layers}
        model = {}
        for name, mean in means.items():
            before = server.model.get(name, server.initial(name))
            is_B = _factor(server.round) == "B"
            model[name] = LowRank(mean, before.A) if is_B else LowRank(before.B, mean)
        return ServerUpdate(model=model, lora=means)


def _factor(round: int) -> Literal["B", "A"]:
    """The factor that a round trains."""
    return "B" if round % 2 == 0 else "A"
