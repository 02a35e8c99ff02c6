"""A site's answers in a session of secure aggregation, stage by stage, with its states on disk.

This module imports no torch: only the stage in which the site trains needs it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedsmoothlora.errors import KeysError, SiteError, WireError
from fedsmoothlora.federation.payload import Payload
from fedsmoothlora.flower.questions import Question
from fedsmoothlora.flower.secure_sessions import SecureSessions
from fedsmoothlora.flower.trusted import TrustedSites
from fedsmoothlora.printable import printable
from fedsmoothlora.secure_aggregation import site
from fedsmoothlora.secure_aggregation.fixed_point import Words
from fedsmoothlora.secure_aggregation.identities import fingerprint, public_bytes
from fedsmoothlora.secure_aggregation.messages import Advertisement, Confirmation, Delivery, Session
from fedsmoothlora.secure_aggregation.serialization import dumped, dumped_masked, loaded
from fedsmoothlora.secure_aggregation.site import Advertised, Confirmed, MaskSent, Shared

EXPERIMENT = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class SecureSite:
    """A site that masks its uploads.

    Attributes:
        client: the site's client id.
        state: the folder of the site's state.
        key: the registered key of its SuperNode.
        trusted: the sites whose keys it trusts.
    """

    client: str
    state: Path
    key: ec.EllipticCurvePrivateKey
    trusted: TrustedSites

    @classmethod
    def at(cls, node: Mapping[str, Any]) -> SecureSite:
        """The site of a node with these values of ``--node-config``.

        Raises ``SiteError`` if its key or the file of trusted sites is missing or cannot be used, or if they
        do not belong together.
        """
        for key, what in (
            ("client-id", "say which client this site is"),
            ("key", "say where the private key of this site's SuperNode is"),
            ("sites", "say where the file of trusted sites is, which `fedsmoothlora flower trust` writes"),
        ):
            if not isinstance(node.get(key), str):
                raise SiteError(f"--node-config: {key} is missing, and privacy.secure_aggregation: {what}")
        client, path = str(node["client-id"]), Path(str(node["key"]))
        try:
            trusted = TrustedSites.read(Path(str(node["sites"])))
            private = _private_key(path)
        except KeysError as error:
            raise SiteError(f"--node-config: {error}") from None
        own = fingerprint(public_bytes(private))
        if trusted.fingerprints.get(client) != own:
            raise SiteError(
                f"--node-config: the key {path} has the fingerprint {own}, and {node['sites']} has "
                f"{trusted.fingerprints.get(client, 'none')} for {client}"
            )
        state = Path(str(node.get("state", "fedsmoothlora-state")))
        return cls(client=client, state=state, key=private, trusted=trusted)

    def check(self, clients: Sequence[str]) -> None:
        """Raise ``SiteError`` if the federation has clients whose keys this site does not know."""
        if unknown := [client for client in clients if client not in self.trusted.fingerprints]:
            raise SiteError(
                f"--node-config: the file of trusted sites has no fingerprint of {printable(unknown[0])}, "
                "a client of this federation"
            )

    def answer(self, question: Question) -> Payload:
        """The answer to a stage in which the site does not train.

        Raises ``SecureAggregationError`` if the coordinator breaks the rules, ``WireError`` if the question
        cannot be read.
        """
        payload = question.payload
        if payload is None:
            raise WireError("it has no message")
        stages: dict[str, Callable[[SecureSessions, bytes], bytes]] = {
            "advertise": self._advertise,
            "share": self._share,
            "confirm": self._confirm,
            "reveal": self._reveal,
        }
        if question.kind not in stages:
            raise WireError("it is no stage of secure aggregation in which the site does not train")
        sessions = self._sessions(payload.fields.get("experiment"))
        with sessions.locked():
            return Payload(stages[question.kind](sessions, payload.tensors), {})

    def mask(
        self,
        experiment: str,
        round: int,
        exchange: int,
        deliveries: Mapping[str, Delivery],
        numbers: Callable[[Session], Words],
    ) -> bytes:
        """Stage 3, after the site has trained: its masked integers.

        Args:
            experiment: the run's identity.
            round: the round in which the site has trained.
            exchange: which exchange of the round it was.
            deliveries: by other site, its shares for this one.
            numbers: the integers for a session.

        Raises ``SecureAggregationError`` as `fedsmoothlora.secure_aggregation.site.mask`, and if the session
        is that of another sum.
        """
        sessions = self._sessions(experiment)
        with sessions.locked():
            sessions.expect(round, exchange)
            state = sessions.take(Shared)
            after, masked = site.mask(state, deliveries, numbers(state.advertised.session))
            sessions.keep(after)
        return dumped_masked(masked)

    def _advertise(self, sessions: SecureSessions, data: bytes) -> bytes:
        session = loaded(Session, data)
        if sessions.run != session.run:
            raise WireError("its session belongs to another run")
        state, own = site.advertise(session, self.client, self.key, self.trusted.fewest)
        sessions.begin(session)
        sessions.keep(state)
        return dumped(own)

    def _share(self, sessions: SecureSessions, data: bytes) -> bytes:
        roster = loaded(dict[str, Advertisement], data)
        after, shares = site.share(sessions.take(Advertised), roster, self.trusted.fingerprints)
        sessions.keep(after)
        return dumped(shares)

    def _confirm(self, sessions: SecureSessions, data: bytes) -> bytes:
        after, confirmation = site.confirm(sessions.take(MaskSent), loaded(list[str], data), self.key)
        sessions.keep(after)
        return dumped(confirmation)

    def _reveal(self, sessions: SecureSessions, data: bytes) -> bytes:
        # A coordinator that was stopped asks again, for shares of the one list that this site has signed.
        state = sessions.take(Confirmed, again=True)
        revealed = site.reveal(state, loaded(dict[str, Confirmation], data))
        sessions.end(state.sent.session)
        return dumped(revealed)

    def _sessions(self, experiment: object) -> SecureSessions:
        if not isinstance(experiment, str) or not EXPERIMENT.fullmatch(experiment):
            raise WireError("its experiment is not 32 hex digits")
        # Sites on one machine may share the state's folder.
        own = hashlib.sha256(self.client.encode()).hexdigest()[:32]
        return SecureSessions(self.state / experiment / "secure" / own, experiment)


def _private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A site's private key, as `fedsmoothlora.flower.keys.write_node_key` writes it."""
    try:
        found = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise KeysError(f"{path} is no private key in OpenSSH's format: {error}") from None
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise KeysError(f"{path} is no key of an elliptic curve; `fedsmoothlora flower key` writes one")
    return found
