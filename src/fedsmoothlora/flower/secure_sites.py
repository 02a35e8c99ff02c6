"""The sites of a session of secure aggregation, as the coordinator reaches them through Flower's messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from flwr.app import RecordDict

from fedsmoothlora.callbacks import Callback, NotesOnly
from fedsmoothlora.errors import WireError
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.payload import Payload
from fedsmoothlora.federation.wire import pack
from fedsmoothlora.flower.questions import MESSAGE_TYPES, Stage
from fedsmoothlora.flower.records import from_records, to_records
from fedsmoothlora.secure_aggregation.fixed_point import FixedPoint
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
from fedsmoothlora.secure_aggregation.serialization import dumped, loaded, loaded_masked

Reply = TypeVar("Reply")


class Visits(Protocol):
    """Sends contents to clients, and yields the replies of those that are done."""

    def __call__(
        self,
        kind: str,
        what: str,
        clients: Sequence[str],
        content_for: Callable[[str], RecordDict],
        callback: Callback,
    ) -> Iterator[tuple[str, RecordDict]]: ...


@dataclass(frozen=True, kw_only=True)
class SecureSites:
    """Sends each stage as one message (`fedsmoothlora.secure_aggregation.session.Sites`).

    The message in which a site trains is that of the round, with the shares for the site.

    Attributes:
        session: the session.
        code: the code of the clients' tensors.
        message: builds a client's message of the round.
        spent: receives a client's epsilon, with ``privacy.unit = "sample"``.
        visits: sends contents to clients.
        callback: notified of every client's round, and of the reason if a client is lost.
    """

    session: Session
    code: FixedPoint
    message: Callable[[str], Message]
    spent: Callable[[str, float], None]
    visits: Visits
    callback: Callback

    def advertise(self, session: Session) -> Mapping[str, Advertisement]:
        """Stage 1."""
        return self._stage("advertise", session.clients, dumped(session), Advertisement)

    def share(self, roster: Roster) -> Mapping[str, Shares]:
        """Stage 2."""
        return self._stage("share", roster, dumped(dict(roster), dict[str, Advertisement]), Shares)

    def mask(self, deliveries: Mapping[str, Mapping[str, Delivery]]) -> Mapping[str, Masked]:
        """Stage 3, in which the sites train."""

        def content(client: str) -> RecordDict:
            packed = pack(self.message(client))
            shares = dumped(dict(deliveries[client]), dict[str, Delivery]).decode()
            return to_records(replace(packed, fields={**packed.fields, "deliveries": shares}))

        return self._read(
            "mask",
            list(deliveries),
            content,
            self._masked,
            self.callback,
        )

    def _masked(self, client: str, payload: Payload) -> Masked:
        """A site's masked integers; its epsilon comes beside them."""
        found = loaded_masked(payload.tensors, self.code)
        epsilon = payload.fields.get("epsilon")
        if isinstance(epsilon, float) and epsilon >= 0:
            self.spent(client, epsilon)
        return found

    def confirm(self, summed: Sequence[str]) -> Mapping[str, Confirmation]:
        """Stage 4."""
        return self._stage("confirm", summed, dumped(list(summed), list[str]), Confirmation)

    def reveal(self, confirmations: Mapping[str, Confirmation]) -> Mapping[str, Revealed]:
        """Stage 5."""
        data = dumped(dict(confirmations), dict[str, Confirmation])
        return self._stage("reveal", confirmations, data, Revealed)

    def _stage(
        self, stage: Stage, clients: Iterable[str], data: bytes, reply: type[Reply]
    ) -> dict[str, Reply]:
        """A stage in which all clients are sent the same."""
        content = to_records(Payload(data, {"experiment": self.session.run}))
        return self._read(
            stage,
            list(clients),
            lambda client: RecordDict(dict(content)),
            lambda client, payload: loaded(reply, payload.tensors),
            NotesOnly(self.callback),  # the clients' bars are for their training
        )

    def _read(
        self,
        stage: Stage,
        clients: Sequence[str],
        content: Callable[[str], RecordDict],
        read: Callable[[str, Payload], Any],
        callback: Callback,
    ) -> dict[str, Any]:
        what, found = f"round {self.session.round + 1} ({stage})", {}
        for client, received in self.visits(MESSAGE_TYPES[stage], what, clients, content, callback):
            try:
                found[client] = read(client, from_records(received))
            except WireError as error:
                callback.on_note(f"{what}: client {client} is left out: {error}")
        return found
