"""The messages of secure aggregation, as plain values.

The five stages, and the message of a site in each::

    1  advertise   Advertisement   signed public keys
    2  share       Shares          the shares of two secrets, encrypted for each other site
    3  mask        Masked          the masked integers
    4  confirm     Confirmation    a signed list of the sites whose masked integers are added up
    5  reveal      Revealed        shares with which the coordinator removes the masks of the sum
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedsmoothlora.secure_aggregation.fixed_point import Words


@dataclass(frozen=True, kw_only=True)
class Session:
    """One attempt of one sum of a round.

    Every key and every signature belongs to one session, so nothing of another session can be replayed.

    Attributes:
        run: the run's identity.
        round: the round, counted from 0.
        attempt: how often the round was repeated.
        clients: the clients that are asked, sorted.
        exchange: 1 for the second sum of a round that has two, otherwise 0.
        threshold: how many sites must remain until the last stage. More than half of the clients, so that the
            coordinator cannot get both secrets of a site from two groups of sites.
    """

    run: str
    round: int
    attempt: int
    exchange: Literal[0, 1] = 0
    clients: tuple[str, ...]
    threshold: int

    def __post_init__(self) -> None:
        count = len(self.clients)
        if list(self.clients) != sorted(set(self.clients)):
            raise ValueError("the clients of a session must be sorted and different")
        if not max(2, count // 2 + 1) <= self.threshold <= count:
            raise ValueError(
                f"the threshold is {self.threshold} of {count} clients; it must be at least 2, "
                "more than half of the clients, and at most all of them"
            )

    def context(self, purpose: str, *parts: str) -> bytes:
        """Bytes that belong to one purpose in this session alone, for signatures and keys."""
        session = [self.run, self.round, self.exchange, self.attempt, list(self.clients), self.threshold]
        return json.dumps(["fedsmoothlora secure aggregation 1", purpose, session, *parts]).encode()


@dataclass(frozen=True, kw_only=True)
class Advertisement:
    """Stage 1: a site's public keys for this session, signed with its registered key.

    Attributes:
        client: the site's client id.
        cipher_key: the public key that agrees on the encryption of shares, a compressed point of P-384.
        mask_key: the public key that agrees on masks, as ``cipher_key``.
        seed_hash: SHA-256 of the secret of the site's own mask.
        identity: the public part of the registered key.
        signature: of all this and the session.
    """

    client: str
    cipher_key: bytes
    mask_key: bytes
    seed_hash: bytes
    identity: bytes
    signature: bytes = b""

    def signed(self, session: Session) -> bytes:
        """The bytes that the signature is of."""
        parts = (self.cipher_key, self.mask_key, self.seed_hash)
        return session.context("keys", self.client, *(part.hex() for part in parts))


Roster = Mapping[str, Advertisement]
"""The advertisements of the sites that take part after stage 1, by client."""


def roster_hash(roster: Roster) -> str:
    """SHA-256 of a roster without its signatures."""
    keys = [(c, a.cipher_key.hex(), a.mask_key.hex(), a.seed_hash.hex()) for c, a in sorted(roster.items())]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Stage 2: a site's shares for all sites of the roster.

    Attributes:
        ciphertexts: by other site, the encrypted shares.
        hashes: by site, its own included, SHA-256 of its shares of the site's seed and of the site's mask
            key. A site that later reveals another share is found by them.
    """

    ciphertexts: Mapping[str, bytes]
    hashes: Mapping[str, tuple[bytes, bytes]]


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """The shares of one site for another one, as the coordinator passes them on."""

    ciphertext: bytes
    hashes: tuple[bytes, bytes]


@dataclass(frozen=True, kw_only=True)
class Masked:
    """Stage 3: a site's masked integers.

    Attributes:
        numbers: the masked integers.
        unusable: the sites whose shares this site cannot use.
    """

    numbers: Words
    unusable: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """Stage 4: a site's signature of the summed sites, the sites that shared, and the roster."""

    signature: bytes


def confirmed(session: Session, roster: Roster, sharing: Sequence[str], summed: Sequence[str]) -> bytes:
    """The bytes that a `Confirmation` signs."""
    lists = json.dumps([list(sharing), list(summed)])
    return session.context("summed", roster_hash(roster), lists)


@dataclass(frozen=True, kw_only=True)
class Revealed:
    """Stage 5: a site's shares of one secret of each site.

    Attributes:
        seeds: by summed site, the share of its seed.
        mask_keys: by site that shared and was lost before it sent its integers, the share of its mask key.
    """

    seeds: Mapping[str, bytes]
    mask_keys: Mapping[str, bytes]
