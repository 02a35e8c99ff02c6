"""The states of clients on disk, in one folder for each client."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import quote

from torch import Tensor

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.errors import StateError
from fedsmoothlora.federation.client_state import ClientState, Segment
from fedsmoothlora.federation.serialization import flatten, products_in, serialised, unflatten
from fedsmoothlora.methods import Update
from fedsmoothlora.storage.files import make_folder, storage_errors
from fedsmoothlora.storage.hashed_files import read_hashed_json, read_tensors, write_hashed_json, write_if_new
from fedsmoothlora.storage.privacy_ledger import StoredLedger

_LONGEST_NAME = 100


class StoredStates:
    """Client states on disk. A client's state is read when the client takes part in a round.

    Memory does not grow with the number of clients. A missing, truncated or altered file is reported to the
    callback, and the client continues without it.

    Args:
        folder: the folder of the clients' folders.
        experiment: the run's identity; states of other runs are not used.
    """

    def __init__(self, folder: Path, experiment: str) -> None:
        self._folder = folder
        self._experiment = experiment

    def load(self, client: str, callback: Callback) -> ClientState:
        """The readable part of the client's state."""
        folder = folder_of(self._folder, client)
        if not (folder / "state.json").is_file():
            return ClientState()

        def readable(name: str, digest: str) -> dict[str, LowRank | Tensor] | None:
            try:
                return unflatten(read_tensors(folder / name, digest))
            except StateError as error:
                callback.on_note(f"client {client}: {error}")
                return None

        try:
            table = read_hashed_json(folder / "state.json")
        except StateError as error:
            callback.on_note(f"client {client}: {error}")
            return ClientState()
        if table["experiment"] != self._experiment:
            callback.on_note(f"client {client}: its state in {folder} belongs to another run and is not used")
            return ClientState()
        uploads: dict[int, Update] = {}
        for round, digest in table["uploads"].items():
            upload = readable(_upload_name(int(round), digest), digest)
            if upload is not None:
                uploads[int(round)] = upload
        segments = []
        for first, last, digest in table["segments"]:
            products = readable(segment_name(first, last, digest), digest)
            if products is not None:
                segments.append(Segment(first, last, products_in(products)))
        return ClientState(uploads=uploads, segments=tuple(segments))

    def save(self, client: str, state: ClientState) -> None:
        """Write new files, then ``state.json``, then remove the files that it no longer names.

        Raises ``StorageError`` with the path of a file that cannot be written or removed.
        """
        folder = folder_of(self._folder, client)
        make_folder(folder)
        # File names contain a part of the content's hash. Existing files therefore need not be written again,
        # and the files of the old state.json stay unchanged until the new one replaces it.
        uploads: dict[str, str] = {}
        segments: list[tuple[int, int, str]] = []
        named: set[str] = set()
        for round, upload in state.uploads.items():
            data, uploads[str(round)] = serialised(flatten(upload))
            named.add(write_if_new(folder / _upload_name(round, uploads[str(round)]), data))
        for one in state.segments:
            data, digest = serialised(flatten(one.updates))
            segments.append((one.first, one.last, digest))
            named.add(write_if_new(folder / segment_name(one.first, one.last, digest), data))
        table = {"experiment": self._experiment, "uploads": uploads, "segments": segments}
        write_hashed_json(folder / "state.json", table)
        for path in folder.glob("*.safetensors"):
            if path.name not in named:
                with storage_errors(path):
                    path.unlink()

    def ledger(self, client: str) -> StoredLedger:
        """The client's ledger of releases, in ``privacy.json`` of its folder."""
        make_folder(folder_of(self._folder, client))
        return StoredLedger(folder_of(self._folder, client) / "privacy.json")


def folder_of(folder: Path, client: str) -> Path:
    """The folder of a client in the folder of all clients."""
    # A client's id may have any characters and any length, but a folder's name may not. The folder's name
    # of a shortened id contains "=", which does not occur in a quoted id.
    name = quote(client, safe=" ").replace(".", "%2E")
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}={hashlib.sha256(client.encode()).hexdigest()[:32]}"
    return folder / name


def _upload_name(round: int, digest: str) -> str:
    return f"upload-{round + 1:04d}-{digest[:16]}.safetensors"


def segment_name(first: int, last: int, digest: str) -> str:
    """The name of the file of updates ``S^first ... S^{last-1}``."""
    return f"updates-{first + 1:04d}-{last:04d}-{digest[:16]}.safetensors"
