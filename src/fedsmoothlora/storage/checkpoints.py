"""The server's checkpoints and updates in a run's folder.

Tensors are stored as safetensors, everything else as JSON. Every file is written whole. The SHA-256 of a
safetensors file is recorded in the JSON file, so a truncated or altered file is found before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableSequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from torch import Tensor

from fedsmoothlora.algebra.coding import decoded
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.config.settings import CheckpointSettings
from fedsmoothlora.errors import StateError
from fedsmoothlora.federation.serialization import flatten, products_in, unflatten, unflatten_coded
from fedsmoothlora.federation.server import Server
from fedsmoothlora.federation.staleness import Baseline, InFlight
from fedsmoothlora.storage.files import make_folder, storage_errors
from fedsmoothlora.storage.hashed_files import (
    read_hashed_json,
    read_tensors,
    verified_bytes,
    write_hashed_json,
    write_tensors,
)


class StoredUpdates(MutableSequence[Coded]):
    """The server updates ``S^0, S^1, ...``, one file each, which is read at every access.

    ``folder/0001.safetensors`` is ``S^0``, the update that round 1 merged.

    Args:
        folder: the folder of the files.
        hashes: SHA-256 of the existing files, in order.
    """

    def __init__(self, folder: Path, hashes: list[str] | None = None) -> None:
        self._folder = folder
        self.hashes: list[str] = list(hashes or [])
        make_folder(folder)

    def __len__(self) -> int:
        return len(self.hashes)

    @overload
    def __getitem__(self, index: int) -> Coded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Coded]: ...
    def __getitem__(self, index: int | slice) -> Coded | list[Coded]:
        if isinstance(index, int) and index < 0:
            index += len(self)
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return unflatten_coded(read_tensors(self._path(index), self.hashes[index]))

    def insert(self, index: int, value: Coded) -> None:
        """Write the next update. Raises ``ValueError`` anywhere but at the end."""
        if index != len(self):
            raise ValueError(f"server updates can only be appended; got position {index} of {len(self)}")
        self.hashes.append(write_tensors(self._path(index), flatten(value)))

    def __setitem__(self, index: Any, value: Any) -> None:
        raise TypeError("a merged server update cannot be changed")

    def __delitem__(self, index: Any) -> None:
        raise TypeError("a merged server update cannot be removed")

    def _path(self, index: int) -> Path:
        return self._folder / f"{index + 1:04d}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after ``round`` finished rounds, as recorded in its JSON file."""

    path: Path
    table: Mapping[str, Any]

    @property
    def round(self) -> int:
        """The number of finished rounds."""
        return int(self.table["round"])


class Checkpoints:
    """The checkpoints of a run, one for each round: ``ROUND.json`` and ``ROUND.safetensors``.

    Args:
        folder: the folder of the files.
        settings: ``[checkpoint]``, which sets how many are kept.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings) -> None:
        self._folder = folder
        self._settings = settings
        make_folder(folder)

    def save(self, server: Server, updates: StoredUpdates, progress: Mapping[str, Any]) -> None:
        """Write the server's state, then remove the checkpoints that the settings do not keep.

        Args:
            server: the server after the round.
            updates: the server's updates.
            progress: the run's own state as plain JSON values; the checkpoint of its ``best_round`` is kept.

        Raises ``StorageError`` if a file cannot be written or removed.
        """
        stem = f"{server.round:04d}"
        tensors = {
            **_under("model", flatten(server.model)),
            **_under("lora", flatten(server.lora or {})),
            **_under("changes", flatten(_by_round(server.changes.sent))),
            **_under("left", server.changes.left),
            **_under("memory", flatten(server.memory)),
            **_under("head", server.head),
            **_under("moments", flatten(server.optimizer.moments)),
            **_under("control", server.control or {}),
            **_under("change", flatten(server.last_delta)),
            **_under("baseline", flatten(_by_round({t: b.sent for t, b in server.baselines.items()}))),
            **_under("baseline head", flatten(_by_round({t: b.head for t, b in server.baselines.items()}))),
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
            "behind": sorted(server.changes.behind),
            "epsilons": server.epsilons,
            "clip_norm": None if server.private is None else server.private.clip_norm,
            "progress": progress,
        }
        if server.participation.asynchronous:
            table["in_flight"] = {"time": server.in_flight.time, "clients": server.in_flight.clients}
        write_hashed_json(self._folder / f"{stem}.json", table)
        server.oldest = self._prune(server.round, progress["best_round"])

    def in_flight(self) -> set[tuple[str, int]]:
        """The clients that were in flight at a kept checkpoint, each with the round in which it began."""
        found: set[tuple[str, int]] = set()
        for path in self.newest_first():
            with suppress(StateError):  # a damaged checkpoint is not used
                table = read_hashed_json(path).get("in_flight", {})
                found |= {(client, began) for _, client, began in table.get("clients", ())}
        return found

    def newest_first(self) -> Iterator[Path]:
        """Paths of the checkpoints' JSON files, the newest first."""
        yield from sorted(self._folder.glob("[0-9]*.json"), key=lambda path: int(path.stem), reverse=True)

    def load(self, path: Path, updates_folder: Path) -> tuple[Checkpoint, dict[str, Tensor], StoredUpdates]:
        """Read a checkpoint with its tensors and updates, and check every file.

        Raises ``StateError`` with the path of a missing, truncated or altered file.
        """
        table = read_hashed_json(path)
        tensors = read_tensors(path.with_suffix(".safetensors"), table["tensors"])
        updates = StoredUpdates(updates_folder, table["updates"])
        for index, digest in enumerate(updates.hashes):
            verified_bytes(updates._path(index), digest)
        return Checkpoint(path, table), tensors, updates

    def _prune(self, round: int, best: int) -> dict[str, int]:
        """Remove checkpoints that are not kept.

        Returns ``accepted`` of the oldest checkpoint from which the run may be resumed.
        """
        # Checkpoints of later rounds are damaged; otherwise the run would have been resumed from them.
        ours = [path for path in self.newest_first() if int(path.stem) <= round]
        kept = ours[: self._settings.keep]
        for path in self.newest_first():
            if path not in kept and (path not in ours or int(path.stem) != best):
                with storage_errors(path):
                    path.unlink()
                    path.with_suffix(".safetensors").unlink(missing_ok=True)
        try:
            accepted: dict[str, int] = read_hashed_json(kept[-1])["accepted"]
        except StateError:  # if it is damaged, clients must keep all their state
            return {}
        return accepted


def restore(
    server: Server, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], updates: StoredUpdates
) -> None:
    """Set the state of a server, built from the same configuration, to that of a checkpoint."""
    table = checkpoint.table
    server.round = checkpoint.round
    server.experiment = table["experiment"]
    server.updates = updates
    server.received = dict(table["received"])
    server.accepted = dict(table["accepted"])
    server.samples = dict(table["samples"])
    server.oldest = {}
    server.model = _products(_below("model", tensors))
    server.lora = unflatten_coded(_below("lora", tensors)) if table["sends_less"] else None
    server.changes.sent = _rounds_of(unflatten_coded(_below("changes", tensors)))
    server.changes.left = _below("left", tensors)
    server.changes.behind = set(table.get("behind", ()))  # older checkpoints have none
    server.epsilons = dict(table.get("epsilons", {}))
    if server.private is not None and table.get("clip_norm") is not None:
        server.private.clip_norm = float(table["clip_norm"])
    server.memory = unflatten(_below("memory", tensors))
    server.head = _below("head", tensors)
    server.optimizer.moments = unflatten(_below("moments", tensors))
    if server.control is not None:
        server.control = _below("control", tensors)
    server.last_delta = unflatten(_below("change", tensors))
    if "in_flight" in table:
        flight = table["in_flight"]
        server.in_flight = InFlight(flight["time"], tuple((f, c, t) for f, c, t in flight["clients"]))
        sent = _rounds_of(unflatten(_below("baseline", tensors)))
        heads = _rounds_of(unflatten(_below("baseline head", tensors)))
        server.baselines = {
            began: Baseline(decoded(sent.get(began, {})), _tensors(heads.get(began, {})))
            for began in {began for _, _, began in server.in_flight.clients}
        }


def _tensors(update: Coded) -> dict[str, Tensor]:
    return {name: value for name, value in update.items() if isinstance(value, Tensor)}


def _by_round(changes: Mapping[int, Coded]) -> Coded:
    """Changes of several rounds as one update: ``ROUND:NAME``."""
    return {f"{t}:{key}": value for t, update in changes.items() for key, value in update.items()}


def _rounds_of(update: Coded) -> dict[int, Coded]:
    """The inverse of `_by_round`."""
    found: dict[int, dict[str, Any]] = {}
    for name, value in update.items():
        t, _, key = name.partition(":")
        found.setdefault(int(t), {})[key] = value
    return dict(found)


def _products(tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    return products_in(unflatten(tensors))


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}:{name}": tensor for name, tensor in tensors.items()}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{prefix}:"): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}:")
    }
