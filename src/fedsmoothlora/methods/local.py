"""No communication: every client trains its own LoRA on its own data; the floor.

There is no global model: global figures are means of the clients' models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsmoothlora.averaging import products
from fedsmoothlora.methods import ClientView, Sent, ServerUpdate, ServerView, Start, Traits, Update, Upload

TRAITS = Traits(
    client_ranks=True,
    global_model=False,
    shares_head=False,
    step_on=None,
    no_step_because="its server averages nothing",
    float32_because="it sends nothing",
)


FACTS = {
    "down": "0",
    "cannot": "learn from others",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Local training has no options of its own."""


def sends(round: int) -> Sent:
    """Nothing."""
    return "nothing"


def start(client: ClientView, options: Options) -> Start:
    """The client's own last factors, at first PEFT's initialisation."""
    own = products({name: client.kept[name] for name in client.layers if name in client.kept})
    return Start(lora=own or {name: client.initial(name) for name in client.layers})


def upload(trained: Update, start: Start, client: ClientView, options: Options) -> Upload:
    """Nothing; the factors are kept."""
    return Upload(sent={}, kept=trained)


def aggregate(
    uploads: Sequence[Update], weights: Sequence[float], server: ServerView, options: Options
) -> ServerUpdate:
    """Nothing."""
    return ServerUpdate()
