"""Federated averaging of the targeted weights themselves (FedAvg, arXiv 1602.05629): the ceiling.

No LoRA: clients train ``W`` of the targeted layers, the server averages the changes and merges them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsmoothlora.averaging import mean_part
from fedsmoothlora.methods import ClientView, Sent, ServerUpdate, ServerView, Start, Traits, Update, Upload

TRAITS = Traits(
    averages_factors=True,
    coordinates_last=True,
    float32_because="it sends dense weights, and only factors are coded",
)


FACTS = {
    "down": "m*n",
    "cannot": "send little",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Full fine-tuning has no options of its own."""


def sends(round: int) -> Sent:
    """The change of the weight, over ``s``."""
    return "W"


def start(client: ClientView, options: Options) -> Start:
    """The global weights."""
    return Start(lora={}, trains=("W",))


def upload(trained: Update, start: Start, client: ClientView, options: Options) -> Upload:
    """The change of every weight."""
    return Upload(sent=trained)


def aggregate(
    uploads: Sequence[Update], weights: Sequence[float], server: ServerView, options: Options
) -> ServerUpdate:
    """The mean change, merged."""
    return ServerUpdate(merge={name: mean_part(uploads, weights, name) for name in server.layers})
