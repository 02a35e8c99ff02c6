"""What must outlive a process: the server's checkpoints and each client's state, on disk.

Tensors are safetensors, all else is JSON. Every file is written whole, and its SHA-256 stands in the JSON
file that names it, so that a truncated or altered file is found before it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, MutableSequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload
from urllib.parse import quote

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.client_state import ClientState, Segment
from fedsmoothlora.config.settings import CheckpointSettings
from fedsmoothlora.errors import StateError
from fedsmoothlora.files import write_bytes
from fedsmoothlora.lowrank import LowRank
from fedsmoothlora.methods import Update
from fedsmoothlora.server import Server

_LONGEST_NAME = 100


class StoredUpdates(MutableSequence[Update]):
    """The server updates ``S^0, S^1, ...``, a file each, read when they are asked for.

    ``folder/0001.safetensors`` holds ``S^0``: what finished round 1 merged.

    Args:
        folder: where they lie.
        hashes: of those that there are already.
    """

    def __init__(self, folder: Path, hashes: list[str] | None = None) -> None:
        self._folder = folder
        self.hashes: list[str] = list(hashes or [])
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.hashes)

    @overload
    def __getitem__(self, index: int) -> Update: ...
    @overload
    def __getitem__(self, index: slice) -> list[Update]: ...
    def __getitem__(self, index: int | slice) -> Update | list[Update]:
        if isinstance(index, int) and index < 0:
            index += len(self)
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return unflatten(_read(self._path(index), self.hashes[index]))

    def insert(self, index: int, value: Update) -> None:
        """Write the next update. Raises ``ValueError`` anywhere but at the end."""
        if index != len(self):
            raise ValueError(f"server updates are only ever appended; got position {index} of {len(self)}")
        self.hashes.append(write_tensors(self._path(index), flatten(value)))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("a server update that was merged never changes")

    def __delitem__(self, index: Any) -> None:
        raise TypeError("a server update that was merged is never forgotten")

    def _path(self, index: int) -> Path:
        return self._folder / f"{index + 1:04d}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after ``round`` finished rounds, as its JSON file says it."""

    path: Path
    table: Mapping[str, Any]

    @property
    def round(self) -> int:
        """Finished rounds."""
        return int(self.table["round"])


class Checkpoints:
    """The checkpoints of a run, one a round: ``ROUND.json`` and, beside it, ``ROUND.safetensors``.

    Args:
        folder: where they lie.
        settings: how many are kept.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings) -> None:
        self._folder = folder
        self._settings = settings
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, server: Server, updates: StoredUpdates, progress: Mapping[str, Any]) -> None:
        """Write the server's state, then forget what the settings say.

        Args:
            server: after the round.
            updates: its updates.
            progress: what the run itself must find again, plain JSON values; ``best_round`` is kept.
        """
        stem = f"{server.round:04d}"
        tensors = {
            **_under("model", flatten(server.model)),
            **_under("lora", flatten(server.lora or {})),
            **_under("memory", flatten(server.memory)),
            **_under("head", server.head),
            **_under("moments", flatten(server.optimizer.moments)),
            **_under("control", server.control or {}),
            **_under("change", flatten(server.change)),
        }
        table = {
            "round": server.round,
            "rounds": server.rounds,
            "experiment": server.experiment,
            "tensors": write_tensors(self._folder / f"{stem}.safetensors", tensors),
            "updates": updates.hashes,
            "received": server.received,
            "accepted": server.accepted,
            "samples": server.samples,
            "sends_less": server.lora is not None,
            "progress": progress,
        }
        _write_json(self._folder / f"{stem}.json", table)
        server.oldest = self._prune(server.round, progress["best_round"])

    def newest_first(self) -> Iterator[Path]:
        """Paths of the checkpoints' JSON files."""
        yield from sorted(self._folder.glob("[0-9]*.json"), key=lambda path: int(path.stem), reverse=True)

    def load(self, path: Path, updates_folder: Path) -> tuple[Checkpoint, dict[str, Tensor], StoredUpdates]:
        """A checkpoint with its tensors, every file checked.

        Raises ``StateError`` that names the file which is missing, truncated or altered.
        """
        table = _read_json(path)
        tensors = _read(path.with_suffix(".safetensors"), table["tensors"])
        updates = StoredUpdates(updates_folder, table["updates"])
        for index, digest in enumerate(updates.hashes):
            _verified(updates._path(index), digest)
        return Checkpoint(path, table), tensors, updates

    def _prune(self, round: int, best: int) -> dict[str, int]:
        """Remove what need not be kept; the ``accepted`` of the oldest checkpoint that a resume may use."""
        # Those after this round were damaged, or the run would not be at this round again.
        ours = [path for path in self.newest_first() if int(path.stem) <= round]
        kept = ours[: self._settings.keep]
        for path in self.newest_first():
            if path not in kept and (path not in ours or int(path.stem) != best):
                path.unlink()
                path.with_suffix(".safetensors").unlink(missing_ok=True)
        try:
            accepted: dict[str, int] = _read_json(kept[-1])["accepted"]
        except StateError:  # damaged: nothing will go back to it, but to be safe nothing is forgotten
            return {}
        return accepted


def restore(
    server: Server, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], updates: StoredUpdates
) -> None:
    """Put a checkpoint's state into a server that was built from the same configuration."""
    table = checkpoint.table
    server.round = checkpoint.round
    server.experiment = table["experiment"]
    server.updates = updates
    server.received = dict(table["received"])
    server.accepted = dict(table["accepted"])
    server.samples = dict(table["samples"])
    server.oldest = {}
    server.model = _products(_below("model", tensors))
    server.lora = unflatten(_below("lora", tensors)) if table["sends_less"] else None
    server.memory = unflatten(_below("memory", tensors))
    server.head = _below("head", tensors)
    server.optimizer.moments = unflatten(_below("moments", tensors))
    if server.control is not None:
        server.control = _below("control", tensors)
    server.change = unflatten(_below("change", tensors))


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
        """What the client kept, as far as it can be read."""
        folder = self._of(client)
        if not (folder / "state.json").is_file():
            return ClientState()

        def readable(name: str, digest: str) -> dict[str, LowRank | Tensor] | None:
            try:
                return unflatten(_read(folder / name, digest))
            except StateError as error:
                callback.on_note(f"client {client}: {error}")
                return None

        try:
            table = _read_json(folder / "state.json")
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
                segments.append(Segment(first, last, _only_products(products)))
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
            named.add(_write_new(folder / _upload_name(round, uploads[str(round)]), data))
        for one in state.segments:
            data, digest = serialised(flatten(one.updates))
            segments.append((one.first, one.last, digest))
            named.add(_write_new(folder / _segment_name(one.first, one.last, digest), data))
        table = {"experiment": self._experiment, "uploads": uploads, "segments": segments}
        _write_json(folder / "state.json", table)
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


def flatten(update: Update) -> dict[str, Tensor]:
    """Factors by ``LAYER/B`` and ``LAYER/A``, plain tensors by their names, as a tensor file holds them."""
    tensors: dict[str, Tensor] = {}
    for name, value in update.items():
        if isinstance(value, LowRank):
            tensors[f"{name}/B"], tensors[f"{name}/A"] = value.B, value.A
        else:
            tensors[name] = value
    return tensors


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, LowRank | Tensor]:
    """The inverse of `flatten`."""
    update: dict[str, LowRank | Tensor] = {}
    for key, tensor in tensors.items():
        if key.endswith("/B"):
            name = key.removesuffix("/B")
            update[name] = LowRank(tensor, tensors[f"{name}/A"])
        elif not key.endswith("/A"):
            update[key] = tensor
    return update


def _products(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    return _only_products(unflatten(tensors))


def _only_products(update: Mapping[str, LowRank | Tensor]) -> dict[str, LowRank]:
    return {name: value for name, value in update.items() if isinstance(value, LowRank)}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}:{name}": tensor for name, tensor in tensors.items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}:"): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}:")
    }


def _upload_name(round: int, digest: str) -> str:
    return f"upload-{round + 1:04d}-{digest[:16]}.safetensors"


def _segment_name(first: int, last: int, digest: str) -> str:
    return f"updates-{first + 1:04d}-{last:04d}-{digest[:16]}.safetensors"


def serialised(tensors: Mapping[str, Tensor]) -> tuple[bytes, str]:
    """Tensors as the bytes of a safetensors file, and their SHA-256."""
    data = save_tensors(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    )
    return data, hashlib.sha256(data).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file whole; its SHA-256."""
    data, digest = serialised(tensors)
    write_bytes(path, data)
    return digest


def _write_new(path: Path, data: bytes) -> str:
    """Write a file unless it holds these bytes already; its name."""
    if not path.is_file() or path.read_bytes() != data:
        write_bytes(path, data)
    return path.name


def _read(path: Path, digest: str) -> dict[str, Tensor]:
    return load_tensors(_verified(path, digest))


def _verified(path: Path, digest: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise StateError(f"{path} is truncated or was altered: its SHA-256 is not the one recorded")
    return data


def _write_json(path: Path, table: Mapping[str, Any]) -> None:
    """Write a JSON object with its own SHA-256 in it."""
    body = json.dumps(table, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    write_bytes(path, json.dumps({**table, "sha256": digest}, sort_keys=True, indent=1).encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = dict(json.loads(path.read_bytes()))
        digest = table.pop("sha256")
        whole = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest() == digest
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise StateError(f"{path} is truncated or was altered: its SHA-256 is not the one recorded")
    return dict(table)
