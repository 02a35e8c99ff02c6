"""FLoRA (arXiv 2409.05976): factors stacked, their exact mean merged, a fresh random start each round.

``[B_1 ... B_C] [p_1 A_1; ...; p_C A_C] = sum_c p_c B_c A_c``, of rank ``sum_c r_c``, is merged and sent down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsmoothlora.averaging import mean_product
from fedsmoothlora.lowrank import LowRank
from fedsmoothlora.methods import ClientView, ServerUpdate, ServerView, Start, Traits, Update, Upload
from fedsmoothlora.methods.fedsmoothlora import trainable

TRAITS = Traits(client_ranks=True)


FACTS = {
    "down": "min(C*r*(m + n), m*n)",
    "cannot": "keep messages down small with many clients; carry a LoRA over from round to round",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """FLoRA has no options of its own."""


def start(client: ClientView, options: Options) -> Start:
    """``B = 0`` and random rows in ``A``, new in every round and at every client."""
    return Start(
        lora={
            name: trainable(LowRank.zeros(layer.m, layer.n), layer.rank, client.generator(name))
            for name, layer in client.layers.items()
        }
    )


def upload(trained: Update, start: Start, client: ClientView, options: Options) -> Upload:
    """Both trained factors."""
    return Upload(sent=trained)


def aggregate(
    uploads: Sequence[Update], weights: Sequence[float], server: ServerView, options: Options
) -> ServerUpdate:
    """``sum_c p_c B_c A_c``, merged exactly."""
    return ServerUpdate(merge={name: mean_product(uploads, weights, name) for name in server.layers})
