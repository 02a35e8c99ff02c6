"""Notes that repeat are shown once, and counted at the end of the run."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedsmoothlora.callbacks import Callback, Callbacks

# A name ends before a space; names with spaces are known from the clients that trained.
_NAMED = re.compile(r"\b(client|layer) ([^ \n]+?)(?=[:;,]?(?: |\n|$))")
_SPACE = "\N{NO-BREAK SPACE}"
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_REFUSED = "upload refused: "
_MOST_NAMED = 5  # clients in a line

_log = logging.getLogger("fedsmoothlora.notes")


@dataclass
class _Repeated:
    """A note and its repetitions.

    Attributes:
        first: the first note.
        count: the number of notes, the first included.
        clients: the clients that they name, in order.
    """

    first: str
    count: int = 0
    clients: dict[str, None] = field(default_factory=dict)

    def summary(self) -> str:
        """The count, the clients, and the first note."""
        names = list(self.clients)
        shown = ", ".join(names[:_MOST_NAMED])
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        about = f", about {len(names)} clients ({shown}{more})" if len(names) > 1 else ""
        return f"{self.count} notes of this kind in all{about}: {self.first}"


class FoldedNotes(Callbacks):
    """Passes on the first note of each kind at once, and the count of a kind when the run ends.

    Notes are of one kind if they differ only in numbers and in the names of clients and layers. Notes on
    refused uploads are all passed on: each is evidence of what a client sent. So is every other event. With
    ``--verbose``, the log has the repetitions too.

    Args:
        callbacks: in the order in which they are notified.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        super().__init__(callbacks)
        self._notes: dict[str, _Repeated] = {}
        self._spaced: set[str] = set()

    def on_client_begin(self, client: str, steps: int) -> None:
        """Pass it on, and learn the client's name."""
        if " " in client:
            self._spaced.add(client)
        super().on_client_begin(client, steps)

    def on_note(self, text: str) -> None:
        """Pass on the note if it is the first of its kind, or on a refused upload."""
        if _REFUSED in text:
            super().on_note(text)
            return
        joined = text
        for client in sorted(self._spaced, key=len, reverse=True):
            joined = joined.replace(f"client {client}", f"client {client.replace(' ', _SPACE)}")
        note = self._notes.setdefault(kind(joined), _Repeated(text))
        note.count += 1
        names = [match[2].replace(_SPACE, " ") for match in _NAMED.finditer(joined) if match[1] == "client"]
        note.clients |= dict.fromkeys(names)
        if note.count == 1:
            super().on_note(text)
        else:
            _log.debug(text)

    def on_run_end(self) -> None:
        """Pass on a line for each kind of note that was repeated."""
        notes, self._notes = self._notes, {}
        for note in notes.values():
            if note.count > 1:
                super().on_note(note.summary())
        super().on_run_end()


def kind(text: str) -> str:
    """A note without its numbers and without the names of clients and layers."""
    return _NUMBER.sub("*", _NAMED.sub(r"\1 *", text))
