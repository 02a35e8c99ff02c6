"""The states of clients on disk, a folder each."""

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
from fedsmoothlora.storage.hashed_files import read_hashed_json, read_tensors, write_hashed_json, write_if_new

_LONGEST_NAME = 100


class StoredStates:
    """Every client's state in a folder of its own, read when the client is visited.

    Memory does not grow with clients. A file that is missing, truncated or altered is said in the log, and
    the client goes on without it.

    Args:
        folder: where the clients' folders lie.
        experiment: the run's identity; another run's states are not used.
    """

    def __init__(self, folder: Path, experiment: str) -> None:
        self._folder = folder
        self._experiment = experiment

    def load(self, client: str, callback: Callback) -> ClientState:
        """The state that the client kept, as far as it can be read."""
        folder = self._of(client)
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
            products = readable(_segment_name(first, last, digest), digest)
            if products is not None:
                segments.append(Segment(first, last, products_in(products)))
        return ClientState(uploads=uploads, segments=tuple(segments))

    def save(self, client: str, state: ClientState) -> None:
        """Write what is new, then ``state.json``, then remove what it no longer names."""
        folder = self._of(client)
        folder.mkdir(parents=True, exist_ok=True)
        # Names hold a part of the content's hash: what is there already need not be written again, and the
        # files that the old state.json names stay as they are until the new one has taken its place.
        uploads: dict[str, str] = {}
        segments: list[tuple[int, int, str]] = []
        named: set[str] = set()
        for round, upload in state.uploads.items():
            data, uploads[str(round)] = serialised(flatten(upload))
            named.add(write_if_new(folder / _upload_name(round, uploads[str(round)]), data))
        for one in state.segments:
            data, digest = serialised(flatten(one.updates))
            segments.append((one.first, one.last, digest))
            named.add(write_if_new(folder / _segment_name(one.first, one.last, digest), data))
        table = {"experiment": self._experiment, "uploads": uploads, "segments": segments}
        write_hashed_json(folder / "state.json", table)
        for path in folder.glob("*.safetensors"):
            if path.name not in named:
                path.unlink()

    def _of(self, client: str) -> Path:
        # A client's id may hold anything and be of any length; its folder's name may not. An id that was
        # shortened has a "=" in its folder's name, which no quoted one has.
        name = quote(client, safe=" ").replace(".", "%2E")
        if len(name) > _LONGEST_NAME:
            name = f"{name[:_LONGEST_NAME]}={hashlib.sha256(client.encode()).hexdigest()[:32]}"
        return self._folder / name


def _upload_name(round: int, digest: str) -> str:
    return f"upload-{round + 1:04d}-{digest[:16]}.safetensors"


def _segment_name(first: int, last: int, digest: str) -> str:
    return f"updates-{first + 1:04d}-{last:04d}-{digest[:16]}.safetensors"
