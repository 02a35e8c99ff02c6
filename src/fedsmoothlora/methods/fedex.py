"""FedEx-LoRA (arXiv 2410.09432): FedIT, with what averaging the factors misses merged into the backbone.

``W += s (sum_c p_c B_c A_c - B A)``, ``B = sum_c p_c B_c``, ``A = sum_c p_c A_c``: the global model is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsmoothlora.averaging import mean_factors, mean_product, products
from fedsmoothlora.methods import ClientView, ServerUpdate, ServerView, Start, Traits, Update, Upload

TRAITS = Traits(
    averages_factors=True,
    step_on=None,
    no_step_because="what it merges is what averaging the factors missed, and would not be with another step",
    float32_because="what it merges is a small difference of larger products, which rounding would drown",
)


FACTS = {
    "down": "r*(m + n) + min((C + 1)*r*(m + n), m*n)",
    "cannot": "keep messages down small with many clients",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """FedEx-LoRA has no options of its own."""


def start(client: ClientView, options: Options) -> Start:
    """The server's factors; in the first round PEFT's initialisation, the same for all clients."""
    return Start(lora=products(client.server_lora) or {name: client.initial(name) for name in client.layers})


def upload(trained: Update, start: Start, client: ClientView, options: Options) -> Upload:
    """Both trained factors."""
    return Upload(sent=trained)


def aggregate(
    uploads: Sequence[Update], weights: Sequence[float], server: ServerView, options: Options
) -> ServerUpdate:
    """Mean factors as the next LoRA; the residual ``sum_c p_c B_c A_c - B A`` merged."""
    model = mean_factors(uploads, weights, server.layers)
    residual = {name: mean_product(uploads, weights, name) - lora for name, lora in model.items()}
    return ServerUpdate(model=model, merge=residual)
