"""Put the whole norm of the upload into one layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from fedsmoothlora.experiments.attacks.base import UploadAttack

if TYPE_CHECKING:
    from fedsmoothlora.federation.messages import Message, Reply
    from fedsmoothlora.methods import Layer


@dataclass(frozen=True, kw_only=True)
class OneLayer(UploadAttack):
    """Reverse the layer with the largest update and give it ``strength`` times the norm of the whole upload.

    All other layers send zeros, and the head is honest. A check of the norm of the whole upload cannot see
    that it is in one layer.

    Attributes:
        kind: ``one_layer``.
        strength: the norm of the upload, in norms of the honest one.
    """

    kind: Literal["one_layer"] = "one_layer"
    strength: Annotated[float, Gt(0)] = 5.0

    def forged(self, reply: Reply, message: Message, layers: Mapping[str, Layer]) -> Reply:
        """The reply with an upload in one layer."""
        from fedsmoothlora.experiments.attack_suite.forging import norm_of, times

        norms = {name: norm_of(value) for name, value in reply.sent.items()}
        whole = sum(norm**2 for norm in norms.values()) ** 0.5
        if not whole:
            return reply
        largest = max(norms, key=lambda name: norms[name])
        factors = dict.fromkeys(norms, 0.0) | {largest: -self.strength * whole / norms[largest]}
        return replace(reply, sent={name: times(value, factors[name]) for name, value in reply.sent.items()})
