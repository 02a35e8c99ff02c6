"""FlexLoRA (arXiv 2402.11505): the mean product's SVD goes back as LoRA, to every client at its own rank.

Client ``c`` continues from ``SVD_{r_c}(DW)``, ``DW = sum_c p_c B_c A_c``; nothing is merged. With server
feedback ``SVD(DW + E)`` goes back, and what it leaves is the next ``E`` (error feedback, arXiv 1901.09847).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from fedsmoothlora.averaging import mean_product, products
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.lowrank import LowRank
from fedsmoothlora.methods import ClientView, Layer, ServerUpdate, ServerView, Start, Traits, Update, Upload
from fedsmoothlora.methods.fedsmoothlora import trainable

TRAITS = Traits(client_ranks=True, step_on="product")


FACTS = {
    "down": "r*(m + n)",
    "cannot": "hold more than `r` directions of the mean, unless `server_feedback`",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of ``[method]``.

    Attributes:
        server_feedback: add what the last truncation cut away to the next mean.
        feedback_rank: rank at which that memory is cut off; never unless set.
    """

    server_feedback: bool = False
    feedback_rank: Annotated[int, Ge(1)] | None = None


def check(layers: Mapping[str, Layer], options: Options, partial: bool) -> None:
    """Refuse a cap on a memory that is not kept."""
    if options.feedback_rank is not None and not options.server_feedback:
        raise ConfigError(
            f"method.feedback_rank = {options.feedback_rank} belongs to method.server_feedback = true"
        )


def start(client: ClientView, options: Options) -> Start:
    """The server's LoRA at the client's own rank; in the first round PEFT's initialisation."""
    sent = products(client.server_lora)
    lora = {}
    for name, layer in client.layers.items():
        # Singular factors by falling singular values: the first r_c columns are SVD_{r_c}.
        product = sent.get(name, client.initial(name))
        own = LowRank(product.B[:, : layer.rank], product.A[: layer.rank])
        lora[name] = trainable(own, layer.rank, client.generator(name))
    return Start(lora=lora)


def upload(trained: Update, start: Start, client: ClientView, options: Options) -> Upload:
    """Both trained factors."""
    return Upload(sent=trained)


def aggregate(
    uploads: Sequence[Update], weights: Sequence[float], server: ServerView, options: Options
) -> ServerUpdate:
    """``SVD_r(DW + E)``; without feedback ``E = 0``."""
    model, memory = {}, {}
    for name, layer in server.layers.items():
        mean = mean_product(uploads, weights, name)
        left = server.memory.get(name)
        if isinstance(left, LowRank):
            mean = mean + left
        model[name] = server.as_sent(mean.truncate(layer.rank))  # what coding it loses is fed back too
        if options.server_feedback:
            memory[name] = (mean - model[name]).truncate(options.feedback_rank, tolerance=1e-6)
    return ServerUpdate(model=model, memory=memory)
