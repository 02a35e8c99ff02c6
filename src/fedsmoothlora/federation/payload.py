"""The content of a message or a reply as bytes and plain values; reading this module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Field = str | int | float


@dataclass(frozen=True)
class Payload:
    """The content of a message or a reply as it is sent (`fedsmoothlora.federation.wire`).

    Attributes:
        tensors: a safetensors file whose table is deflated, or the message of a stage of secure aggregation.
        fields: texts and numbers, by name.
    """

    tensors: bytes
    fields: Mapping[str, Field]
