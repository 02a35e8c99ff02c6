"""A site's states between the stages of secure aggregation, on disk, each to be used once.

Two rules keep a dishonest coordinator from asking twice:

- A session is later than all sessions before it, by round and attempt. So no key is used in two sessions, and
  nothing of an earlier one can be replayed.
- A round in which the site has revealed shares is over. Another sum of the same round, over other sites,
  would differ from the first one by the upload of a site.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from fedsmoothlora.errors import SecureAggregationError, StateError, WireError
from fedsmoothlora.secure_aggregation.messages import Session
from fedsmoothlora.secure_aggregation.serialization import dumped, loaded
from fedsmoothlora.storage.files import make_folder, read_bytes, storage_errors, write_whole

State = TypeVar("State")

_LAST, _STATE = "last.json", "state.json"


@dataclass(frozen=True, kw_only=True)
class _Last:
    """The last session, and the last round in which the site has revealed shares; -1 if there is none."""

    round: int = -1
    attempt: int = -1
    revealed: int = -1


class SecureSessions:
    """The states of one client in one run.

    Its files are for their owner alone. They hold private keys and shares of other sites.

    Args:
        folder: where they are kept; it is made.
        run: the run's identity.
    """

    def __init__(self, folder: Path, run: str = "") -> None:
        self._folder = folder
        self.run = run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other process is in such a block.

        A coordinator that sends two messages at once could have one state used twice otherwise.
        """
        make_folder(self._folder)
        with FileLock(self._folder / "lock", mode=0o600):
            yield

    def expect(self, round: int, attempt: int) -> None:
        """Raise ``SecureAggregationError`` unless the last session is that of this attempt."""
        last = self._last()
        if (round, attempt) != (last.round, last.attempt):
            raise SecureAggregationError(
                f"the coordinator asks for attempt {attempt} of round {round} in a session of attempt "
                f"{last.attempt} of round {last.round}"
            )

    def begin(self, session: Session) -> None:
        """Record a new session, and forget the state of the one before.

        Raises ``SecureAggregationError`` if it is not later than all sessions before it, or if the site has
        revealed shares in its round. Raises ``StateError`` if the record cannot be read.
        """
        last = self._last()
        if (session.round, session.attempt) <= (last.round, last.attempt):
            raise SecureAggregationError(
                f"the coordinator asks for attempt {session.attempt} of round {session.round}; this site has "
                f"taken part in attempt {last.attempt} of round {last.round}"
            )
        if session.round <= last.revealed:
            raise SecureAggregationError(
                f"the coordinator asks for another sum of round {session.round}, of which this site has "
                "revealed shares already"
            )
        self._write(_LAST, dumped(replace(last, round=session.round, attempt=session.attempt)))
        self._remove(_STATE)

    def keep(self, state: object) -> None:
        """Store the state after a stage, in place of an earlier one."""
        self._write(_STATE, dumped(state))

    def take(self, kind: type[State]) -> State:
        """The stored state, which is forgotten before it is returned.

        Raises ``SecureAggregationError`` if there is none of this kind.
        """
        path = self._folder / _STATE
        data = read_bytes(path) if path.is_file() else b""
        self._remove(_STATE)
        try:
            return loaded(kind, data)
        except WireError:
            raise SecureAggregationError(
                "the coordinator asks for a stage of secure aggregation that is over or has not begun"
            ) from None

    def end(self, session: Session) -> None:
        """Record that the site reveals shares, before it does so."""
        self._write(_LAST, dumped(replace(self._last(), revealed=session.round)))

    def _last(self) -> _Last:
        path = self._folder / _LAST
        try:
            return loaded(_Last, read_bytes(path)) if path.exists() else _Last()
        except WireError as error:
            raise StateError(f"{path} is damaged: {error}") from None

    def _write(self, name: str, data: bytes) -> None:
        """Write a file whole, for its owner alone from the first byte on."""
        make_folder(self._folder)
        with write_whole(self._folder / name) as partial:
            partial.unlink(missing_ok=True)
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)

    def _remove(self, name: str) -> None:
        with storage_errors(self._folder / name, "removed"), suppress(FileNotFoundError):
            (self._folder / name).unlink()
