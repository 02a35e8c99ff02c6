"""FedSA-LoRA (arXiv 2410.01463): ``A`` is shared and averaged, every client keeps its own ``B``.

There is no global model: global figures are means of the clients' models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsmoothlora.averaging import mean_part
from fedsmoothlora.lowrank import LowRank
from fedsmoothlora.methods import ClientView, Sent, ServerUpdate, ServerView, Start, Traits, Update, Upload

TRAITS = Traits(averages_factors=True, global_model=False, step_on="factors")


FACTS = {
    "down": "r*n",
    "cannot": "give a global model: every client's `B` is its own",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """FedSA-LoRA has no options of its own."""


def sends(round: int) -> Sent:
    """``A`` alone."""
    return "A"


def start(client: ClientView, options: Options) -> Start:
    """The server's ``A`` and the client's own last ``B``, at first 0."""
    lora = {}
    for name in client.layers:
        initial, A, B = client.initial(name), client.server_lora.get(name), client.kept.get(name)
        lora[name] = LowRank(
            B if B is not None and not isinstance(B, LowRank) else initial.B,
            A if A is not None and not isinstance(A, LowRank) else initial.A,
        )
    return Start(lora=lora)


def upload(trained: Update, start: Start, client: ClientView, options: Options) -> Upload:
    """The trained ``A``; ``B`` stays at the client."""
    pairs = {name: product for name, product in trained.items() if isinstance(product, LowRank)}
    return Upload(sent={n: p.A for n, p in pairs.items()}, kept={n: p.B for n, p in pairs.items()})


def aggregate(
    uploads: Sequence[Update], weights: Sequence[float], server: ServerView, options: Options
) -> ServerUpdate:
    """``A = sum_c p_c A_c``."""
    return ServerUpdate(lora={name: mean_part(uploads, weights, name) for name in server.layers})
