"""FedIT (FedAvg + LoRA, arXiv 2305.05644): factors averaged separately and kept from round to round.

Every client trains on from the server's factors; the server averages ``B`` and ``A`` apart:
``B = sum_c p_c B_c``, ``A = sum_c p_c A_c``. Nothing is merged: ``W = W^0 + s B A`` throughout. The mean
of products is not the product of means, which is the method's known inexactness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsmoothlora.averaging import mean_factors, products
from fedsmoothlora.methods import ClientView, ServerUpdate, ServerView, Start, Traits, Update, Upload

TRAITS = Traits(averages_factors=True, step_on="factors", coordinates_last=True)


FACTS = {
    "down": "r*(m + n)",
    "cannot": "be exact: the mean of factors is not the mean of products",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """FedIT has no options of its own."""


def start(client: ClientView, options: Options) -> Start:
    """The server's factors; in the first round PEFT's initialisation, the same for all clients."""
    return Start(lora=products(client.server_lora) or {name: client.initial(name) for name in client.layers})


def upload(trained: Update, start: Start, client: ClientView, options: Options) -> Upload:
    """Both trained factors."""
    return Upload(sent=dict(trained))


def aggregate(
    uploads: Sequence[Update], weights: Sequence[float], server: ServerView, options: Options
) -> ServerUpdate:
    """``B = sum_c p_c B_c`` and ``A = sum_c p_c A_c``, the next LoRA of every client."""
    return ServerUpdate(model=mean_factors(uploads, weights, server.layers))
