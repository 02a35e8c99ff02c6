"""A coordinator and its sites in one process. All messages are recorded as the receiver gets them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from fedsmoothlora.secure_aggregation import site
from fedsmoothlora.secure_aggregation.fixed_point import FixedPoint, Words
from fedsmoothlora.secure_aggregation.identities import fingerprint, public_bytes
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
from fedsmoothlora.secure_aggregation.session import Sum, run_session
from fedsmoothlora.secure_aggregation.site import Advertised

STAGES = ("advertise", "share", "mask", "confirm", "reveal")


@cache
def registered_key(client: str) -> ec.EllipticCurvePrivateKey:
    """The registered key of a client, the same in all tests."""
    return ec.generate_private_key(ec.SECP384R1())


@cache
def registered_fingerprint(client: str) -> str:
    return fingerprint(public_bytes(registered_key(client)))


def a_session(count: int, threshold: int, *, round: int = 0, attempt: int = 0) -> Session:
    clients = tuple(f"site-{index:02}" for index in range(count))
    return Session(run="7" * 32, round=round, attempt=attempt, clients=clients, threshold=threshold)


def fingerprints(session: Session) -> dict[str, str]:
    return {client: registered_fingerprint(client) for client in session.clients}


def unaltered(message: Any) -> Any:
    return message


@dataclass
class Simulated:
    """One session.

    Attributes:
        session: the session.
        code: the fixed-point code.
        numbers: the integers of every client.
        lost: by client, the stage in which it sends nothing any more.
        lies: by stage and client, a function that alters the message that the client sends.
        deals: by client, a function that alters its secrets between its advertisement and its shares.
        received: everything that the coordinator received, by stage and client.
        refused: the reasons of the coordinator, by client.
    """

    session: Session
    code: FixedPoint
    numbers: Mapping[str, Words]
    lost: Mapping[str, str] = field(default_factory=dict)
    lies: Mapping[tuple[str, str], Callable[[Any], Any]] = field(default_factory=dict)
    deals: Mapping[str, Callable[[Advertised], Advertised]] = field(default_factory=dict)
    received: dict[tuple[str, str], Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    _states: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Sum:
        found = run_session(self.session, fingerprints(self.session), self.code, self)
        self.refused = dict(found.refused)
        return found

    # -- the sites (`fedsmoothlora.secure_aggregation.session.Sites`)

    def advertise(self, session: Session) -> dict[str, Advertisement]:
        sent = self._stage(
            "advertise",
            session.clients,
            lambda c: site.advertise(session, c, registered_key(c), session.threshold),
        )
        self._states |= {client: deal(self._states[client]) for client, deal in self.deals.items()}
        return sent

    def share(self, roster: Roster) -> dict[str, Shares]:
        known = fingerprints(self.session)
        return self._stage("share", roster, lambda c: site.share(self._states[c], roster, known))

    def mask(self, deliveries: Mapping[str, Mapping[str, Delivery]]) -> dict[str, Masked]:
        return self._stage(
            "mask", deliveries, lambda c: site.mask(self._states[c], deliveries[c], self.numbers[c])
        )

    def confirm(self, summed: Sequence[str]) -> dict[str, Confirmation]:
        return self._stage(
            "confirm", summed, lambda c: site.confirm(self._states[c], summed, registered_key(c))
        )

    def reveal(self, confirmations: Mapping[str, Confirmation]) -> dict[str, Revealed]:
        return self._stage(
            "reveal", confirmations, lambda c: (None, site.reveal(self._states[c], confirmations))
        )

    def summed(self) -> list[str]:
        """The clients whose integers belong to the sum."""
        late = STAGES[STAGES.index("mask") + 1 :]
        return [
            c for c in self.session.clients if self.lost.get(c, late[0]) in late and c not in self.refused
        ]

    def _stage(self, stage: str, clients: Iterable[str], act: Callable[[str], Any]) -> dict[str, Any]:
        sent = {}
        for client in clients:
            lost = self.lost.get(client)
            if lost is not None and STAGES.index(lost) <= STAGES.index(stage):
                continue
            self._states[client], message = act(client)
            sent[client] = self.lies.get((stage, client), unaltered)(message)
            self.received[stage, client] = sent[client]
        return sent


def simulated(session: Session, *, size: int = 8, bits: Any = 32, **more: Any) -> Simulated:
    """A session with seeded random tensors and weights."""
    code = FixedPoint(
        shapes={"B": (size, 2), "A": (2, size)},
        bounds={"B": 2.0, "A": 0.5},
        clients=len(session.clients),
        bits=bits,
    )
    tensors = a_round(session, size)
    numbers = {client: code.encode(parts, weight) for client, (parts, weight) in tensors.items()}
    return Simulated(session=session, code=code, numbers=numbers, **more)


def a_round(session: Session, size: int) -> dict[str, tuple[dict[str, np.ndarray[Any, Any]], float]]:
    """Tensors and weight of every client."""
    draws = np.random.default_rng(3)
    return {
        client: (
            {"B": draws.uniform(-2, 2, (size, 2)), "A": draws.uniform(-0.5, 0.5, (2, size))},
            draws.uniform(0.2, 1),
        )
        for client in session.clients
    }
