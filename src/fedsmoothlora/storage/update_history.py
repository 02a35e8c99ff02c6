"""The server updates that a site has received since the pretrained weights, on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import StateError
from fedsmoothlora.federation.messages import Message
from fedsmoothlora.federation.serialization import flatten, products_in, serialised, unflatten
from fedsmoothlora.methods import Products
from fedsmoothlora.storage.client_store import folder_of, segment_name
from fedsmoothlora.storage.files import make_folder, storage_errors
from fedsmoothlora.storage.hashed_files import read_hashed_json, read_tensors, write_hashed_json, write_if_new


@dataclass(frozen=True)
class Part:
    """The updates of one message, in a file of their own.

    Attributes:
        first: the first round of the sum ``S^first + ... + S^{last-1}``.
        last: the round after its last one.
        digest: SHA-256 of the file.
    """

    first: int
    last: int
    digest: str


class UpdateHistory:
    """The updates of all messages, each in a file; ``state.json`` names them.

    A message takes as long after many rounds as after few: its own updates are written, and the files of the
    others are read only when they are merged.

    Args:
        folder: the folder of the clients' folders.
        experiment: the run's identity; updates of other runs are not used.
        client: the client.
        callback: receives a note on files that cannot be used.
    """

    def __init__(self, folder: Path, experiment: str, client: str, callback: Callback) -> None:
        self._folder = folder_of(folder, client)
        self._experiment, self._client, self._callback = experiment, client, callback
        self._parts = tuple(self._read())

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts in the order of their rounds."""
        return self._parts

    def add(self, message: Message) -> bool:
        """Keep the updates of a message. Updates that are sent again replace the old ones.

        Returns whether these are all updates before the message's round; otherwise nothing is changed.

        Raises ``StorageError`` with the path of a file that cannot be written or removed.
        """
        parts = [part for part in self._parts if part.last <= message.first_update]
        if not _follow_each_other(parts, message.first_update):
            return False
        make_folder(self._folder)
        if message.first_update < message.round:
            updates = {name: LowRank.of(update) for name, update in decoded(message.updates).items()}
            data, digest = serialised(flatten(updates))
            part = Part(message.first_update, message.round, digest)
            write_if_new(self._file(part), data)
            parts.append(part)
        self._write(parts)
        return True

    def updates(self, part: Part) -> Products | None:
        """The sum of a part's updates; None, with a note, if its file is missing or was altered.

        Such a part is forgotten, so that the server sends its updates again.
        """
        try:
            return products_in(unflatten(read_tensors(self._file(part), part.digest)))
        except StateError as error:
            self._callback.on_note(f"client {self._client}: {error}")
            self._write([other for other in self._parts if other != part])
            return None

    def _file(self, part: Part) -> Path:
        return self._folder / segment_name(part.first, part.last, part.digest)

    def _read(self) -> Iterator[Part]:
        path = self._folder / "state.json"
        if not path.is_file():
            return
        try:
            table = read_hashed_json(path)
        except StateError as error:
            self._callback.on_note(f"client {self._client}: {error}")
            return
        if table["experiment"] != self._experiment:
            self._callback.on_note(
                f"client {self._client}: its state in {self._folder} belongs to another run and is not used"
            )
            return
        for first, last, digest in table["segments"]:
            yield Part(first, last, digest)

    def _write(self, parts: list[Part]) -> None:
        """Write ``state.json``, then remove the files that it no longer names."""
        self._parts = tuple(parts)
        segments = [(part.first, part.last, part.digest) for part in parts]
        table = {"experiment": self._experiment, "uploads": {}, "segments": segments}
        write_hashed_json(self._folder / "state.json", table)
        named = {self._file(part) for part in parts}
        for path in self._folder.glob("*.safetensors"):
            if path not in named:
                with storage_errors(path):
                    path.unlink()


def _follow_each_other(parts: Sequence[Part], until: int) -> bool:
    """Whether the parts are the updates of all rounds before ``until``."""
    reached = 0
    for part in parts:
        if part.first != reached:
            return False
        reached = part.last
    return reached == until
