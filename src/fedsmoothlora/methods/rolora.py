"""RoLoRA (arXiv 2502.01755): rounds 0, 2, 4 ... train and average ``B``, rounds 1, 3 ... ``A``, exactly.

In each round one factor is the same at all clients, so that the mean of the other is the mean of products.
``B`` goes first: it starts at 0, where the gradient of ``A`` is 0 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fedsmoothlora.averaging import mean_part
from fedsmoothlora.errors import LostStateError
from fedsmoothlora.lowrank import LowRank
from fedsmoothlora.methods import (
    ClientView,
    Sent,
    ServerUpdate,
    ServerView,
    Start,
    Traits,
    Update,
    Upload,
)

TRAITS = Traits(averages_factors=True, step_on="factors")


FACTS = {
    "down": "r*n / r*m",
    "cannot": "train both factors in one round",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """RoLoRA has no options of its own."""


def sends(round: int) -> Sent:
    """The factor of the round."""
    return "B" if round % 2 == 0 else "A"


def start(client: ClientView, options: Options) -> Start:
    """The server's factors; a client of the last round has the one that was not trained then."""
    lora = {}
    for name in client.layers:
        sent, other = client.server_lora.get(name), client.kept.get(name)
        if sent is None:
            lora[name] = client.initial(name)
        elif isinstance(sent, LowRank):
            lora[name] = sent
        else:
            if not isinstance(other, Tensor):
                raise LostStateError(f"the factor of layer {name} that is not sent again is gone")
            lora[name] = LowRank(sent, other) if sends(client.round - 1) == "B" else LowRank(other, sent)
    return Start(lora=lora, trains=("B",) if sends(client.round) == "B" else ("A",))


def upload(trained: Update, start: Start, client: ClientView, options: Options) -> Upload:
    """The trained factor; the other is kept, for it is not sent again."""
    sent, kept = {}, {}
    for name, product in trained.items():
        assert isinstance(product, LowRank)
        own, other = (product.B, product.A) if sends(client.round) == "B" else (product.A, product.B)
        sent[name], kept[name] = own, other
    return Upload(sent=sent, kept=kept)


def aggregate(
    uploads: Sequence[Update], weights: Sequence[float], server: ServerView, options: Options
) -> ServerUpdate:
    """The mean of the round's factor; the other stays."""
    means = {name: mean_part(uploads, weights, name) for name in server.layers}
    model = {}
    for name, mean in means.items():
        before = server.model.get(name, server.initial(name))
        is_B = sends(server.round) == "B"
        model[name] = LowRank(mean, before.A) if is_B else LowRank(before.B, mean)
    return ServerUpdate(model=model, lora=means)
