"""A site's states between the stages of secure aggregation, on disk, each to be used once.

Two rules keep a dishonest coordinator from asking twice:

- A session is later than all sessions before it, by round, exchange and attempt. So no key is used in two
  sessions, and nothing of an earlier one can be replayed.
- A sum of a round for which the site has revealed shares is over. Another one, over other sites, would differ
  from the first one by the upload of a site.
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
    """The last session, and the last sum for which the site has revealed shares; -1 if there is none."""

    round: int = -1
    exchange: int = -1
    attempt: int = -1
    revealed: tuple[int, int] = (-1, -1)


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

    def expect(self, round: int, exchange: int) -> None:
        """Raise ``SecureAggregationError`` unless the last session is of this exchange of the round."""
        last = self._last()
        if (round, exchange) != (last.round, last.exchange):
            raise SecureAggregationError(
                f"the coordinator asks for exchange {exchange} of round {round} in a session of exchange "
                f"{last.exchange} of round {last.round}"
            )

    def begin(self, session: Session) -> None:
        """Record a new session, and forget the state of the one before.

        Raises ``SecureAggregationError`` if it is not later than all sessions before it, or if the site has
        revealed shares in its round. Raises ``StateError`` if the record cannot be read.
        """
        last = self._last()
        asked = session.round, session.exchange, session.attempt
        if asked <= (last.round, last.exchange, last.attempt):
            raise SecureAggregationError(
                f"the coordinator asks for attempt {session.attempt} of round {session.round}; this site has "
                f"taken part in attempt {last.attempt} of round {last.round}"
            )
        if asked[:2] <= last.revealed:
            raise SecureAggregationError(
                f"the coordinator asks for another sum of round {session.round}, of which this site has "
                "revealed shares already"
            )
        self._write(
            _LAST,
            dumped(replace(last, round=session.round, exchange=session.exchange, attempt=session.attempt)),
        )
        self._remove(_STATE)

    def keep(self, state: object) -> None:
        """Store the state after a stage, in place of an earlier one."""
        self._write(_STATE, dumped(state))

    def take(self, kind: type[State], *, again: bool = False) -> State:
        """The stored state, which is forgotten before it is returned.

        Args:
            kind: its type.
            again: it is not forgotten, because what the site does with it is the same every time.

        Raises ``SecureAggregationError`` if there is none of this kind.
        """
        path = self._folder / _STATE
        data = read_bytes(path) if path.is_file() else b""
        if not again:
            self._remove(_STATE)
        try:
            return loaded(kind, data)
        except WireError:
            raise SecureAggregationError(
                "the coordinator asks for a stage of secure aggregation that is over or has not begun"
            ) from None

    def end(self, session: Session) -> None:
        """Record that the site reveals shares, before it does so."""
        revealed = session.round, session.exchange
        self._write(_LAST, dumped(replace(self._last(), revealed=revealed)))

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
