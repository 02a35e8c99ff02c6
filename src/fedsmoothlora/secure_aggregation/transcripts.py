"""A coordinator's transcript of a session as bytes, so that a stopped one can ask for the shares again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedsmoothlora.errors import WireError
from fedsmoothlora.secure_aggregation.fixed_point import FixedPoint
from fedsmoothlora.secure_aggregation.messages import (
    Advertisement,
    Confirmation,
    Masked,
    Session,
    Shares,
)
from fedsmoothlora.secure_aggregation.serialization import dumped, loaded
from fedsmoothlora.secure_aggregation.session import Transcript

_LENGTH = 8  # bytes before the masked integers, which hold the length of the JSON


@dataclass(frozen=True, kw_only=True)
class _Plain:
    """A transcript without its masked integers, which follow it in the order of ``unusable``."""

    session: Session
    roster: Mapping[str, Advertisement]
    shared: Mapping[str, Shares]
    unusable: Mapping[str, tuple[str, ...]]
    confirmations: Mapping[str, Confirmation]
    refused: Mapping[str, str]


def dumped_transcript(transcript: Transcript) -> bytes:
    """The transcript as bytes."""
    clients = sorted(transcript.masked)
    plain = _Plain(
        session=transcript.session,
        roster=dict(transcript.roster),
        shared=dict(transcript.shared),
        unusable={client: transcript.masked[client].unusable for client in clients},
        confirmations=dict(transcript.confirmations),
        refused=dict(transcript.refused),
    )
    head = dumped(plain)
    numbers = (transcript.masked[client].numbers.tobytes() for client in clients)
    return b"".join((len(head).to_bytes(_LENGTH, "little"), head, *numbers))


def loaded_transcript(data: bytes, code: FixedPoint) -> Transcript:
    """The inverse of `dumped_transcript`.

    Args:
        data: the bytes.
        code: the code of the integers.

    Raises ``WireError`` if they are no transcript, or have another number of integers.
    """
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    plain = loaded(_Plain, data[_LENGTH:end])
    if len(data) - end != len(plain.unusable) * code.size * code.dtype.itemsize:
        raise WireError("it has another number of masked integers")
    numbers = np.frombuffer(data, code.dtype, offset=end).reshape(len(plain.unusable), code.size)
    return Transcript(
        session=plain.session,
        roster=plain.roster,
        shared=plain.shared,
        masked={
            client: Masked(numbers=row, unusable=unusable)
            for (client, unusable), row in zip(sorted(plain.unusable.items()), numbers, strict=True)
        },
        confirmations=plain.confirmations,
        refused=plain.refused,
    )
