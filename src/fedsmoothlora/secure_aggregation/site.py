"""A site's part of secure aggregation, one function for each stage.

This is the protocol of Bonawitz et al. (2017, https://eprint.iacr.org/2017/281) against a malicious
coordinator; SecAgg+ (Bell et al., 2020, https://eprint.iacr.org/2020/704) with a complete graph is the same.
For the session's sites ``u`` and ``v`` with the agreed secret ``s_uv``, and the site's own seed ``b_u``, the
site sends the integers ``x_u`` as::

    y_u = x_u + PRG(b_u) + sum_{v > u} PRG(s_uv) - sum_{v < u} PRG(s_uv)

The pairwise masks cancel in the sum. Of every summed site the others reveal shares of ``b_u``, of every lost
site shares of the key that agrees on ``s_uv``, and never both.

Each function takes the state that the one before returned, and each state must be used **once**. A site that
masks two vectors with one state shows their difference.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cryptography.fernet import InvalidToken
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt
from flwr.common.secure_aggregation.secaggplus_utils import (
    share_keys_plaintext_concat,
    share_keys_plaintext_separate,
)

from fedsmoothlora.errors import SecureAggregationError
from fedsmoothlora.secure_aggregation.agreement import (
    agreed_key,
    agreed_secret,
    is_public_key,
    new_private_key,
    public_key,
)
from fedsmoothlora.secure_aggregation.fixed_point import Words
from fedsmoothlora.secure_aggregation.identities import fingerprint, is_signed, public_bytes, sign
from fedsmoothlora.secure_aggregation.masks import add_mask, mask_key
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

_SEED = 32  # bytes


@dataclass(frozen=True, kw_only=True)
class Advertised:
    """The state after stage 1. The keys are private ones; ``seed`` is ``b_u``."""

    session: Session
    own: Advertisement
    cipher_key: bytes
    mask_key: bytes
    seed: bytes


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The state after stage 2: the roster, and the site's shares of its own seed and mask key."""

    advertised: Advertised
    roster: Roster
    own_shares: tuple[bytes, bytes]


@dataclass(frozen=True, kw_only=True)
class MaskSent:
    """The state after stage 3. Seed and keys of the site are not needed any more.

    Attributes:
        session: the session.
        client: the site's client id.
        roster: the roster.
        sharing: the sites that shared, sorted.
        shares: by site, the shares of its seed and of its mask key that this site holds.
    """

    session: Session
    client: str
    roster: Roster
    sharing: tuple[str, ...]
    shares: Mapping[str, tuple[bytes, bytes]]


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """The state after stage 4: the one list of summed sites that this site signs."""

    sent: MaskSent
    summed: tuple[str, ...]


def advertise(
    session: Session, client: str, private: ec.EllipticCurvePrivateKey, fewest: int
) -> tuple[Advertised, Advertisement]:
    """Stage 1: new keys for this session.

    Args:
        session: the session, from the coordinator.
        client: the site's client id.
        private: the site's registered key.
        fewest: the smallest threshold to which this site agrees.

    Raises:
        SecureAggregationError: the session is without this client, or its threshold is smaller than
            ``fewest``.
    """
    if client not in session.clients:
        raise SecureAggregationError(f"the session is without client {client}")
    if session.threshold < fewest:
        raise SecureAggregationError(
            f"the coordinator wants to add up {session.threshold} sites; this site agrees to {fewest} or more"
        )
    cipher, mask, seed = new_private_key(), new_private_key(), secrets.token_bytes(_SEED)
    unsigned = Advertisement(
        client=client,
        cipher_key=public_key(cipher),
        mask_key=public_key(mask),
        seed_hash=hashlib.sha256(seed).digest(),
        identity=public_bytes(private),
    )
    own = signed_by(private, session, unsigned)
    return Advertised(session=session, own=own, cipher_key=cipher, mask_key=mask, seed=seed), own


def signed_by(
    private: ec.EllipticCurvePrivateKey, session: Session, unsigned: Advertisement
) -> Advertisement:
    """An advertisement with the signature of a registered key."""
    fields = {
        name: getattr(unsigned, name)
        for name in ("client", "cipher_key", "mask_key", "seed_hash", "identity")
    }
    return Advertisement(**fields, signature=sign(private, unsigned.signed(session)))


def refusal(
    session: Session, client: str, advertisement: Advertisement, fingerprints: Mapping[str, str]
) -> str:
    """Why an advertisement cannot be that of a client; empty if it can.

    Args:
        session: the session.
        client: the client.
        advertisement: the advertisement.
        fingerprints: the fingerprint of every client's registered key.
    """
    if client not in session.clients or advertisement.client != client:
        return "it is no client of this session"
    try:
        found = fingerprint(advertisement.identity)
    except ValueError:
        found = "no key"
    if fingerprints.get(client) != found:
        return f"its key is {found}, the registered one is {fingerprints.get(client, 'not known')}"
    if not (is_public_key(advertisement.cipher_key) and is_public_key(advertisement.mask_key)):
        return "its keys for this session are no points of the curve"
    if not is_signed(advertisement.signed(session), advertisement.signature, advertisement.identity):
        return "its keys for this session are not signed by its registered key"
    return ""


def share(state: Advertised, roster: Roster, fingerprints: Mapping[str, str]) -> tuple[Shared, Shares]:
    """Stage 2: shares of the site's seed and mask key for every site of the roster.

    Args:
        state: the state after `advertise`.
        roster: all advertisements, from the coordinator.
        fingerprints: the fingerprints of the clients' registered keys, **not** from the coordinator.

    Raises:
        SecureAggregationError: an advertisement is not signed by its client's registered key, this site's own
            is missing, or there are fewer than the threshold.
    """
    session, client = state.session, state.own.client
    if roster.get(client) != state.own:
        raise SecureAggregationError("this site's own keys are missing or altered")
    for other, advertisement in roster.items():
        if reason := refusal(session, other, advertisement, fingerprints):
            raise SecureAggregationError(f"the keys of client {other} are refused: {reason}")
    _check_count(session, roster, "advertise keys")
    names = sorted(roster)
    shares = {
        name: (seed, key)
        for name, seed, key in zip(
            names,
            create_shares(state.seed, session.threshold, len(names)),
            create_shares(state.mask_key, session.threshold, len(names)),
            strict=True,
        )
    }
    place = {name: index for index, name in enumerate(names)}
    ciphertexts = {
        name: encrypt(
            _cipher(state, roster[name]),
            share_keys_plaintext_concat(place[client], place[name], *shares[name]),
        )
        for name in names
        if name != client
    }
    hashes = {name: share_hashes(*pair) for name, pair in shares.items()}
    after = Shared(advertised=state, roster=roster, own_shares=shares[client])
    return after, Shares(ciphertexts=ciphertexts, hashes=hashes)


def share_hashes(seed: bytes, key: bytes) -> tuple[bytes, bytes]:
    """SHA-256 of a share of a seed and of one of a mask key."""
    return hashlib.sha256(seed).digest(), hashlib.sha256(key).digest()


def mask(state: Shared, deliveries: Mapping[str, Delivery], numbers: Words) -> tuple[MaskSent, Masked]:
    """Stage 3: the masked integers.

    Args:
        state: the state after `share`.
        deliveries: by other site, its shares for this one.
        numbers: the integers (`fedsmoothlora.secure_aggregation.fixed_point.FixedPoint.encode`).

    Raises:
        SecureAggregationError: fewer sites shared than the threshold, or there are shares of a site without
            keys.
    """
    before = state.advertised
    session, client = before.session, before.own.client
    if client in deliveries or not deliveries.keys() <= state.roster.keys():
        raise SecureAggregationError("the coordinator delivers shares of sites that advertised no keys")
    sharing = tuple(sorted((client, *deliveries)))
    _check_count(session, sharing, "share keys")
    shares, unusable = {client: state.own_shares}, []
    for other in sorted(deliveries):
        found = _opened(state, other, deliveries[other])
        if found is None:
            unusable.append(other)
        else:
            shares[other] = found
    masked = numbers.copy()
    add_mask(masked, own_mask_key(session, client, before.seed), 1)
    for other in sorted(deliveries):
        secret = agreed_secret(before.mask_key, state.roster[other].mask_key)
        add_mask(masked, *pair_mask(session, client, other, secret))
    after = MaskSent(session=session, client=client, roster=state.roster, sharing=sharing, shares=shares)
    return after, Masked(numbers=masked, unusable=tuple(unusable))


def own_mask_key(session: Session, client: str, seed: bytes) -> bytes:
    """The key of a site's own mask."""
    return mask_key(seed, session.context("own mask", client))


def pair_mask(session: Session, client: str, other: str, secret: bytes) -> tuple[bytes, Literal[1, -1]]:
    """The key of the mask that two sites share, and the sign with which the first one adds it."""
    return mask_key(
        secret, session.context("pair mask", *sorted((client, other)))
    ), 1 if client < other else -1


def confirm(
    state: MaskSent, summed: Sequence[str], private: ec.EllipticCurvePrivateKey
) -> tuple[Confirmed, Confirmation]:
    """Stage 4: sign the list of the summed sites, so that all sites reveal for the same one.

    Args:
        state: the state after `mask`.
        summed: the sites whose masked integers the coordinator has, sorted.
        private: the site's registered key.

    Raises:
        SecureAggregationError: the list is without this site, has a site that did not share, or is shorter
            than the threshold.
    """
    if state.client not in summed or list(summed) != sorted(set(summed) & set(state.sharing)):
        raise SecureAggregationError(
            "the coordinator wants to add up other sites than those that shared keys"
        )
    _check_count(state.session, summed, "send masked integers")
    signature = sign(private, confirmed(state.session, state.roster, state.sharing, summed))
    return Confirmed(sent=state, summed=tuple(summed)), Confirmation(signature=signature)


def reveal(state: Confirmed, confirmations: Mapping[str, Confirmation]) -> Revealed:
    """Stage 5: shares of the seeds of summed sites and of the mask keys of lost ones.

    Raises ``SecureAggregationError`` if fewer sites than the threshold signed the same lists.
    """
    sent = state.sent
    content = confirmed(sent.session, sent.roster, sent.sharing, state.summed)
    agreeing = [
        client
        for client in state.summed
        if client in confirmations
        and is_signed(content, confirmations[client].signature, sent.roster[client].identity)
    ]
    _check_count(sent.session, agreeing, "sign the same list of summed sites")
    summed = set(state.summed)
    return Revealed(
        seeds={client: pair[0] for client, pair in sent.shares.items() if client in summed},
        mask_keys={client: pair[1] for client, pair in sent.shares.items() if client not in summed},
    )


def _check_count(session: Session, sites: Mapping[str, object] | Sequence[str], what: str) -> None:
    if len(sites) < session.threshold:
        raise SecureAggregationError(f"{len(sites)} sites {what}; the threshold is {session.threshold}")


def _cipher(state: Advertised, other: Advertisement) -> bytes:
    return agreed_key(state.cipher_key, other.cipher_key)


def _opened(state: Shared, other: str, delivery: Delivery) -> tuple[bytes, bytes] | None:
    """The shares of a delivery; None if they are not what the site says it shared."""
    names = sorted(state.roster)
    try:
        plaintext = decrypt(_cipher(state.advertised, state.roster[other]), delivery.ciphertext)
    except (InvalidToken, ValueError):
        return None
    source, target, seed, key = share_keys_plaintext_separate(plaintext)
    if (source, target) != (names.index(other), names.index(state.advertised.own.client)):
        return None
    if (len(seed), len(key)) != tuple(map(len, state.own_shares)):
        return None
    return (seed, key) if share_hashes(seed, key) == tuple(delivery.hashes) else None
