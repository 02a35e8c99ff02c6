"""FRLoRA (ICLR 2025): rounds restart from the leading part of the pretrained weights, changes are merged.

``B_0, A_0`` are the top-r singular directions of ``W^0`` (``sqrt(sigma/s)`` on both), ``W -= s B_0 A_0``
once; each round ``W += s (B A - B_0 A_0)``, ``B = sum_c p_c B_c``, ``A = sum_c p_c A_c``. Here the backbone
keeps ``B_0 A_0`` and a client's start is shifted by ``-B_0 A_0``, which is the same weight at every moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsmoothlora.averaging import mean_factors
from fedsmoothlora.lowrank import LowRank
from fedsmoothlora.methods import ClientView, Layer, ServerUpdate, ServerView, Start, Traits, Update, Upload
from fedsmoothlora.spectral import leading_singular_triplets

TRAITS = Traits(
    averages_factors=True,
    float32_because="what it merges is a small change of the pretrained weights' leading part, and rounding "
    "would drown it",
)


FACTS = {
    "down": "min(2*r*(m + n), m*n)",
    "cannot": "be exact: the mean of factors is not the mean of products",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """FRLoRA has no options of its own."""


def start(client: ClientView, options: Options) -> Start:
    """``(B_0, A_0)``, with the backbone shifted by ``-B_0 A_0``."""
    lora = {name: _leading(client, layer) for name, layer in client.layers.items()}
    return Start(lora=lora, shift={name: -product for name, product in lora.items()})


def upload(trained: Update, start: Start, client: ClientView, options: Options) -> Upload:
    """Both trained factors."""
    return Upload(sent=trained)


def aggregate(
    uploads: Sequence[Update], weights: Sequence[float], server: ServerView, options: Options
) -> ServerUpdate:
    """``B A - B_0 A_0`` of the mean factors, merged."""
    means = mean_factors(uploads, weights, server.layers)
    return ServerUpdate(merge={n: means[n] - _leading(server, layer) for n, layer in server.layers.items()})


def _leading(view: ClientView | ServerView, layer: Layer) -> LowRank:
    """``B_0 A_0 = SVD_r(W^0) / s``, computed once a run."""

    def compute() -> LowRank:
        P, sigma, Q = leading_singular_triplets(view.pretrained(layer.name), layer.rank)
        root = (sigma / layer.scale).sqrt()
        return LowRank(P * root, root[:, None] * Q.mT)

    return view.once(f"leading part of {layer.name}", compute)
