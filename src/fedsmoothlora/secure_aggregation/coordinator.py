"""The coordinator's part of secure aggregation, one function for each stage.

Each function returns what it accepts, and for the sites that it refuses the reasons. It raises
``TooFewSitesError`` if fewer sites than the threshold remain; the round is then repeated in a new session.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.common.secure_aggregation.crypto.shamir import combine_shares

from fedsmoothlora.errors import LyingSitesError, TooFewSitesError
from fedsmoothlora.secure_aggregation.agreement import agreed_secret, public_key
from fedsmoothlora.secure_aggregation.fixed_point import FixedPoint, Words
from fedsmoothlora.secure_aggregation.identities import is_signed
from fedsmoothlora.secure_aggregation.masks import add_mask
from fedsmoothlora.secure_aggregation.messages import (
    Advertisement,
    Confirmation,
    Delivery,
    Masked,
    Revealed,
    Roster,
    Session,
    Shares,
    confirmed,
)
from fedsmoothlora.secure_aggregation.site import own_mask_key, pair_mask, refusal

Refused = dict[str, str]
"""Reasons by client."""


@dataclass(frozen=True, kw_only=True)
class Unmasked:
    """The result of a session.

    Attributes:
        total: the sum of the integers of all summed sites.
        lying: the sites that revealed wrong shares, with the reason. Their integers are in the sum.
    """

    total: Words
    lying: Mapping[str, str]


def collect_keys(
    session: Session, advertisements: Mapping[str, Advertisement], fingerprints: Mapping[str, str]
) -> tuple[Roster, Refused]:
    """After stage 1: the roster, which goes to all its sites."""
    reasons = {c: refusal(session, c, a, fingerprints) for c, a in advertisements.items()}
    roster = {client: advertisements[client] for client in sorted(reasons) if not reasons[client]}
    _check_count(session, roster, "advertised keys")
    return roster, {client: reason for client, reason in reasons.items() if reason}


def collect_shares(
    session: Session, roster: Roster, received: Mapping[str, Shares]
) -> tuple[dict[str, Shares], Refused]:
    """After stage 2: the shares of all sites that shared, for `deliveries`."""
    shared, refused = {}, {}
    for client, shares in sorted(received.items()):
        others = roster.keys() - {client}
        if client not in roster:
            refused[client] = "it advertised no keys"
        elif shares.ciphertexts.keys() != others or shares.hashes.keys() != roster.keys():
            refused[client] = "it does not share with exactly the sites of the roster"
        else:
            shared[client] = shares
    _check_count(session, shared, "shared keys")
    return shared, refused


def deliveries(shared: Mapping[str, Shares], client: str) -> dict[str, Delivery]:
    """The shares that go to one of the sites that shared, by the site that made them."""
    return {
        other: Delivery(ciphertext=shares.ciphertexts[client], hashes=shares.hashes[client])
        for other, shares in shared.items()
        if other != client
    }


def collect_masked(
    session: Session, shared: Mapping[str, Shares], received: Mapping[str, Masked], code: FixedPoint
) -> tuple[dict[str, Masked], Refused]:
    """After stage 3: the masked integers of the sites to add up, whose list goes to all of them."""
    masked, refused = {}, {}
    for client, found in sorted(received.items()):
        if client not in shared:
            refused[client] = "it did not share keys"
        elif found.numbers.shape != (code.size,) or found.numbers.dtype != code.dtype:
            refused[client] = f"it does not send {code.size} integers of {code.bits} bits"
        else:
            masked[client] = found
    _check_count(session, masked, "sent masked integers")
    return masked, refused


def collect_confirmations(
    session: Session,
    roster: Roster,
    sharing: Sequence[str],
    summed: Sequence[str],
    received: Mapping[str, Confirmation],
) -> tuple[dict[str, Confirmation], Refused]:
    """After stage 4: the valid signatures, which go to all sites that signed."""
    content = confirmed(session, roster, sorted(sharing), sorted(summed))
    valid, refused = {}, {}
    for client, found in sorted(received.items()):
        if client in summed and is_signed(content, found.signature, roster[client].identity):
            valid[client] = found
        else:
            refused[client] = "it does not sign the list of the summed sites"
    _check_count(session, valid, "signed the list of the summed sites")
    return valid, refused


def unmask(
    session: Session,
    roster: Roster,
    shared: Mapping[str, Shares],
    masked: Mapping[str, Masked],
    revealed: Mapping[str, Revealed],
) -> Unmasked:
    """After stage 5: the sum.

    Args:
        session: the session.
        roster: the result of `collect_keys`.
        shared: the result of `collect_shares`.
        masked: the result of `collect_masked`.
        revealed: the shares of the sites that revealed some, by site.

    Raises:
        TooFewSitesError: fewer valid shares of a secret than the threshold.
        LyingSitesError: the shares that a site made belong to no secret, or to another one than it
            advertised.
    """
    lost = sorted(shared.keys() - masked.keys())
    secrets = _Secrets(
        session, roster, shared, masked, {c: one for c, one in revealed.items() if c in masked}
    )
    seeds = {client: secrets.seed(client) for client in sorted(masked)}
    keys = {client: secrets.mask_key(client) for client in lost}
    secrets.raise_for_lost()
    total = np.zeros_like(next(iter(masked.values())).numbers)
    for client, found in masked.items():
        total += found.numbers
        add_mask(total, own_mask_key(session, client, seeds[client]), -1)
        for other in lost:
            key, sign = pair_mask(session, client, other, agreed_secret(keys[other], roster[client].mask_key))
            add_mask(total, key, -1 if sign > 0 else 1)
    return Unmasked(total=total, lying=secrets.lying)


class _Secrets:
    """Puts revealed shares together, and finds the sites that lie."""

    def __init__(
        self,
        session: Session,
        roster: Roster,
        shared: Mapping[str, Shares],
        masked: Mapping[str, Masked],
        revealed: Mapping[str, Revealed],
    ) -> None:
        self._session, self._roster, self._shared = session, roster, shared
        self._masked, self._revealed = masked, revealed
        self.lying: Refused = {}
        self._dishonest_dealers: Refused = {}
        self._short: list[str] = []

    def seed(self, owner: str) -> bytes:
        """The seed of a summed site; empty if it cannot be found."""
        wanted = self._roster[owner].seed_hash
        return self._found(owner, 0, lambda secret: hashlib.sha256(secret).digest() == wanted)

    def mask_key(self, owner: str) -> bytes:
        """The mask key of a lost site; empty if it cannot be found."""
        wanted = self._roster[owner].mask_key
        return self._found(owner, 1, lambda secret: _is_key(secret, wanted))

    def _found(self, owner: str, which: int, is_right: Callable[[bytes], bool]) -> bytes:
        shares = self._valid(owner, which)
        if len(shares) < self._session.threshold:
            self._short.append(f"{len(shares)} of {owner}")
            return b""
        try:
            secret = combine_shares(shares[: self._session.threshold])
        except ValueError:
            secret = b""
        if not is_right(secret):
            self._dishonest_dealers[owner] = "the shares that it made do not belong to what it advertised"
        return secret

    def raise_for_lost(self) -> None:
        """Raise an error if a secret could not be found."""
        if self._dishonest_dealers:
            raise LyingSitesError({**self.lying, **self._dishonest_dealers})
        if self._short:
            raise TooFewSitesError(
                f"the sites revealed too few valid shares of a secret, {', '.join(self._short)}; "
                f"the threshold is {self._session.threshold}"
                + "".join(f"; {client}: {reason}" for client, reason in self.lying.items())
            )

    def _valid(self, owner: str, which: int) -> list[bytes]:
        found = []
        for client, revealed in sorted(self._revealed.items()):
            share = (revealed.seeds, revealed.mask_keys)[which].get(owner)
            if share is None and owner in self._masked[client].unusable:
                continue
            if (
                share is not None
                and hashlib.sha256(share).digest() == self._shared[owner].hashes[client][which]
            ):
                found.append(share)
            else:
                self.lying[client] = f"it reveals a share of {owner} that {owner} did not make"
        return found


def _is_key(secret: bytes, public: bytes) -> bool:
    try:
        return public_key(secret) == public
    except ValueError:
        return False


def _check_count(session: Session, sites: Mapping[str, object], what: str) -> None:
    if len(sites) < session.threshold:
        raise TooFewSitesError(f"{len(sites)} sites {what}; the threshold is {session.threshold}")
