"""Replies of sites as the coordinator reads them."""

from __future__ import annotations

from flwr.app import RecordDict

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import WireError
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.simulation import ClientReply
from fedsmoothlora.federation.wire import unpack
from fedsmoothlora.flower.questions import Status
from fedsmoothlora.flower.records import from_records, status_of
from fedsmoothlora.printable import printable

SITE_LOG = "the site's own log says why"
_REASONS: dict[Status, str] = {
    "diverged": "diverged and is left out",
    "lost": "sits out: the state that its method kept there is lost",
    "spent": "sits out: another round would pass its privacy.target_epsilon",
    "behind": "sits out: it lacks server updates",
    "failed": f"failed and is left out; {SITE_LOG}",
}


def reply_of(client: str, content: RecordDict, what: str, callback: Callback) -> ClientReply | None:
    """The reply of a client that is done; None, with a note, if it cannot be read.

    Args:
        client: the client of the node that sent it.
        content: the received records.
        what: the round, for the note.
        callback: receives the note.
    """
    try:
        reply = unpack(Reply, from_records(content))
        if reply.client != client:
            raise WireError(f"it names client '{printable(reply.client)}'")
    except WireError as error:
        callback.on_note(f"{what}: upload refused: client {client}: {error}")
        return None
    return ClientReply(client=client, reply=reply)


def status_or_failed(content: RecordDict | None) -> Status:
    """How a client's part ended; ``failed`` if the records do not say."""
    try:
        return "failed" if content is None else status_of(content)
    except WireError:
        return "failed"


def no_reply_reason(content: RecordDict | None) -> str:
    """Why a client that is not done has no reply; None for the records is an error that Flower reports."""
    if content is None:
        return "is left out: Flower saw its process or its node end"
    status = status_or_failed(content)
    return _REASONS.get(status, status)
