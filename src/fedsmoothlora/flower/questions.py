"""The coordinator's questions and a site's answers as plain values.

This module imports neither torch nor Flower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedsmoothlora.federation.payload import Payload

Stage = Literal["advertise", "share", "mask", "confirm", "reveal"]
Kind = Literal["agree", "train", "evaluate"] | Stage
Status = Literal["done", "diverged", "lost", "spent", "behind", "failed"]
"""How a client's part ended: it is done; its training diverged; its method's state is lost; its privacy is
spent; it lacks server updates and asks for all of them; or it failed for a reason that only the site's own
log has."""

WITHOUT_MODEL: tuple[Stage, ...] = ("advertise", "share", "confirm", "reveal")
"""The stages in which a site does not train."""

MESSAGE_TYPES: Mapping[Stage, str] = {
    "advertise": "query.advertise",
    "share": "query.share",
    "mask": "train.masked",
    "confirm": "query.confirm",
    "reveal": "query.reveal",
}
"""The types of Flower's messages."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A message of the coordinator to a site.

    Attributes:
        kind: the site info before round 0, a client's round, the global model's metrics, or a stage of secure
            aggregation.
        payload: the packed `fedsmoothlora.federation.messages.Message` of a client's round or for metrics; in
            the stage ``mask`` with the field ``deliveries``; in other stages the bytes of their message.
    """

    kind: Kind
    payload: Payload | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A site's answer.

    Attributes:
        status: how the client's part ended.
        tables: ``site_info`` or ``metrics``, if there are any; beside metrics that are means over tokens or
            words, ``evaluation`` with their number, ``weight``.
        payload: the packed `fedsmoothlora.federation.messages.Reply` of a client's round, or the bytes of a
            stage's message.
    """

    status: Status
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    payload: Payload | None = None
