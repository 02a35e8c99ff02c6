"""FedMomentum (arXiv 2603.08014, from its abstract): the mean's leading part stays LoRA, the rest is merged.

``SVD_r(DW)``, ``DW = sum_c p_c B_c A_c``, is the next LoRA of all; ``W += s (DW - SVD_r(DW))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsmoothlora.averaging import mean_product, products, products_of
from fedsmoothlora.lowrank import LowRank
from fedsmoothlora.methods import ClientView, ServerUpdate, ServerView, Start, Traits, Update, Upload
from fedsmoothlora.methods.fedsmoothlora import trainable

TRAITS = Traits(
    step_on=None,
    no_step_because="it splits one mean into the next LoRA and what is merged, and has a momentum of its own",
)


FACTS = {
    "down": "r*(m + n) + min((C - 1)*r*(m + n), m*n)",
    "cannot": "keep messages down small with many clients",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """FedMomentum has no options of its own."""


def start(client: ClientView, options: Options) -> Start:
    """The server's LoRA; in the first round PEFT's initialisation, the same for all clients."""
    lora = products(client.server_lora) or {name: client.initial(name) for name in client.layers}
    return Start(
        lora={n: trainable(lora[n], layer.rank, client.generator(n)) for n, layer in client.layers.items()}
    )


def upload(trained: Update, start: Start, client: ClientView, options: Options) -> Upload:
    """Both trained factors."""
    return Upload(sent=trained)


def aggregate(
    uploads: Sequence[Update], weights: Sequence[float], server: ServerView, options: Options
) -> ServerUpdate:
    """``SVD_r(DW)`` as the next LoRA, what it leaves merged: together ``DW``, exactly."""
    model, merge = {}, {}
    for name, layer in server.layers.items():
        most = sum(product.rank for product in products_of(uploads, name))
        mean = mean_product(uploads, weights, name).truncate(most)  # by falling singular values
        r = layer.rank
        model[name] = LowRank(mean.B[:, :r], mean.A[:r])
        merge[name] = LowRank(mean.B[:, r:], mean.A[r:])
    return ServerUpdate(model=model, merge=merge)
