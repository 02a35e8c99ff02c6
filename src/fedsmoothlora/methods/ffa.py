"""FFA-LoRA (arXiv 2403.12313): ``A`` frozen at a shared random start, ``B`` trained and averaged, exactly.

With one ``A`` for all, ``sum_c p_c B_c A = (sum_c p_c B_c) A``: the mean of factors is the mean of products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsmoothlora.averaging import mean_part
from fedsmoothlora.lowrank import LowRank
from fedsmoothlora.methods import ClientView, Sent, ServerUpdate, ServerView, Start, Traits, Update, Upload

TRAITS = Traits(averages_factors=True, step_on="factors", coordinates_last=True)


FACTS = {
    "down": "r*m",
    "cannot": "leave the rows of its random `A`",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """FFA-LoRA has no options of its own."""


def sends(round: int) -> Sent:
    """``B`` alone."""
    return "B"


def start(client: ClientView, options: Options) -> Start:
    """The server's ``B``, at first 0, and the shared ``A``, which is not trained."""
    lora = {}
    for name in client.layers:
        initial, sent = client.initial(name), client.server_lora.get(name)
        B = initial.B if sent is None else sent.B if isinstance(sent, LowRank) else sent
        lora[name] = LowRank(B, initial.A)
    return Start(lora=lora, trains=("B",))


def upload(trained: Update, start: Start, client: ClientView, options: Options) -> Upload:
    """The trained ``B``."""
    return Upload(sent={name: product.B for name, product in trained.items() if isinstance(product, LowRank)})


def aggregate(
    uploads: Sequence[Update], weights: Sequence[float], server: ServerView, options: Options
) -> ServerUpdate:
    """``B = sum_c p_c B_c``; ``A`` needs no sending, every client draws it from the run's seed."""
    B = {name: mean_part(uploads, weights, name) for name in server.layers}
    return ServerUpdate(model={n: LowRank(B[n], server.initial(n).A) for n in server.layers}, lora=B)
