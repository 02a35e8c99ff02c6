"""One session at the coordinator, from its keys to the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedsmoothlora.secure_aggregation import coordinator
from fedsmoothlora.secure_aggregation.fixed_point import FixedPoint, Mean, Words
from fedsmoothlora.secure_aggregation.messages import (
    Advertisement,
    Confirmation,
    Delivery,
    Masked,
    Revealed,
    Roster,
    Session,
    Shares,
)


class Sites(Protocol):
    """Sends the messages of a session to sites, and returns their replies by client.

    A site that does not reply in time, fails or replies with something else is missing from the result. It
    is asked no more.
    """

    def advertise(self, session: Session) -> Mapping[str, Advertisement]:
        """Stage 1, at all clients of the session."""
        ...

    def share(self, roster: Roster) -> Mapping[str, Shares]:
        """Stage 2, at all clients of the roster."""
        ...

    def mask(self, deliveries: Mapping[str, Mapping[str, Delivery]]) -> Mapping[str, Masked]:
        """Stage 3: by client, the shares for it."""
        ...

    def confirm(self, summed: Sequence[str]) -> Mapping[str, Confirmation]:
        """Stage 4, at all summed clients."""
        ...

    def reveal(self, confirmations: Mapping[str, Confirmation]) -> Mapping[str, Revealed]:
        """Stage 5, at all clients that confirmed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sum:
    """The result of a session.

    Attributes:
        total: the sum of the integers of the summed clients.
        mean: their weighted mean.
        summed: the summed clients, sorted.
        refused: by client, why a reply was refused.
        lying: by client, which wrong share it revealed. The sum is right nevertheless.
    """

    total: Words
    mean: Mean
    summed: tuple[str, ...]
    refused: Mapping[str, str]
    lying: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """A session before its last stage: all that the coordinator needs to remove the masks, but the shares.

    Attributes:
        session: the session.
        roster: the result of `coordinator.collect_keys`.
        shared: the result of `coordinator.collect_shares`.
        masked: the result of `coordinator.collect_masked`.
        confirmations: the result of `coordinator.collect_confirmations`.
        refused: by client, why a reply was refused.
    """

    session: Session
    roster: Roster
    shared: Mapping[str, Shares]
    masked: Mapping[str, Masked]
    confirmations: Mapping[str, Confirmation]
    refused: Mapping[str, str]


def collect(session: Session, fingerprints: Mapping[str, str], code: FixedPoint, sites: Sites) -> Transcript:
    """The first four stages.

    Args:
        session: the session.
        fingerprints: the fingerprint of every client's registered key.
        code: the code of the clients' tensors.
        sites: sends the messages.

    Raises ``TooFewSitesError`` if fewer sites than the threshold remain.
    """
    roster, no_keys = coordinator.collect_keys(session, sites.advertise(session), fingerprints)
    shared, no_shares = coordinator.collect_shares(session, roster, sites.share(roster))
    deliveries = {client: coordinator.deliveries(shared, client) for client in shared}
    masked, no_numbers = coordinator.collect_masked(session, shared, sites.mask(deliveries), code)
    confirmations, unsigned = coordinator.collect_confirmations(
        session, roster, list(shared), list(masked), sites.confirm(sorted(masked))
    )
    return Transcript(
        session=session,
        roster=roster,
        shared=shared,
        masked=masked,
        confirmations=confirmations,
        refused=no_keys | no_shares | no_numbers | unsigned,
    )


def unmasked(transcript: Transcript, code: FixedPoint, sites: Sites) -> Sum:
    """The last stage: the weighted mean of the clients that sent masked integers.

    It may be repeated. Sites reveal the same shares every time.

    Raises:
        TooFewSitesError: fewer sites than the threshold reveal valid shares.
        LyingSitesError: the shares that a site made belong to no secret, so there is no sum.
        ValueError: the sum of the weights is not valid, so a site sent numbers that no code gives.
    """
    found = coordinator.unmask(
        transcript.session,
        transcript.roster,
        transcript.shared,
        transcript.masked,
        sites.reveal(transcript.confirmations),
    )
    return Sum(
        total=found.total,
        mean=code.decode(found.total, len(transcript.masked)),
        summed=tuple(sorted(transcript.masked)),
        refused=transcript.refused,
        lying=found.lying,
    )


def run_session(session: Session, fingerprints: Mapping[str, str], code: FixedPoint, sites: Sites) -> Sum:
    """The weighted mean of the clients that remain, by all five stages.

    Arguments and errors are those of `collect` and `unmasked`.
    """
    return unmasked(collect(session, fingerprints, code, sites), code, sites)
