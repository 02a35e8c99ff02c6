"""Store the replies that no checkpoint contains, so that a resumed run does not train these clients again.

Each reply is one safetensors file. The file's metadata contain the fields that are not tensors, and its name
is its SHA-256, so a truncated or altered file is found before it is used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fedsmoothlora.errors import StateError
from fedsmoothlora.federation.messages import Reply
from fedsmoothlora.federation.serialization import flatten, products_in, unflatten, unflatten_coded
from fedsmoothlora.federation.simulation import ClientReply
from fedsmoothlora.storage.files import make_folder, read_bytes, storage_errors, write_bytes

_LENGTH = 8  # bytes of a safetensors file that hold the length of its header
_LONGEST_HEADER = 100_000_000  # bytes, the limit of safetensors
_FIELDS = ("client", "experiment", "round", "attempt", "samples", "metrics")
_PARTS = ("sent", "head", "control", "start")


class StoredReplies:
    """Replies in a folder that exists only while a round is in progress or clients are in flight.

    Args:
        folder: the folder of the files.
        experiment: the run's identity; replies of other runs are not used.
    """

    def __init__(self, folder: Path, experiment: str) -> None:
        self._folder = folder
        self._experiment = experiment

    def keep(self, answer: ClientReply) -> None:
        """Write a reply. Raises ``StorageError`` if it cannot be written."""
        reply = answer.reply
        parts: dict[str, Mapping[str, Any]] = {
            "sent": reply.sent,
            "head": reply.head,
            "control": reply.control,
            "start": answer.start,
        }
        tensors = {
            f"{part}:{name}": tensor.detach().cpu().contiguous().clone()
            for part, update in parts.items()
            for name, tensor in flatten(update).items()
        }
        # A client on another machine may claim any id in its reply, so its real id is recorded too.
        names = (*_FIELDS, "exchange")
        fields = json.dumps({"from": answer.client, **{name: getattr(reply, name) for name in names}})
        data = save_tensors(tensors, metadata={"fields": fields})
        make_folder(self._folder)
        write_bytes(self._folder / f"{hashlib.sha256(data).hexdigest()}.safetensors", data)

    def load(
        self, round: int, attempt: int, note: Callable[[str], None], *, exchange: int = 0
    ) -> dict[str, ClientReply]:
        """The replies of an attempt of a round, by client.

        Args:
            round: ``t``, counted from 0.
            attempt: the attempt of the round.
            note: called with a sentence for every damaged file, whose client is trained again.
            exchange: which exchange of the round they answer.
        """
        found: dict[str, ClientReply] = {}
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                answer = _read(path)
            except StateError as error:
                note(f"{error}; its client is trained again")
                continue
            reply = answer.reply
            found_in = reply.experiment, reply.round, reply.attempt, reply.exchange
            if found_in == (self._experiment, round, attempt, exchange):
                found[answer.client] = answer
        return found

    def clear(self, in_flight: Collection[tuple[str, int]] = ()) -> None:
        """Remove the replies that no checkpoint needs.

        Args:
            in_flight: the clients whose replies are not merged yet, each with the round in which it began.
        """
        if not self._folder.exists():
            return
        if not in_flight:
            with storage_errors(self._folder, "removed"):
                shutil.rmtree(self._folder)
            return
        for path in sorted(self._folder.iterdir()):
            if _sender(path) not in in_flight:
                with storage_errors(path, "removed"):
                    path.unlink()


def _sender(path: Path) -> tuple[str, int] | None:
    """The client that sent a stored reply, and the reply's round; None if the file is no reply."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            header = json.loads(file.read(min(length, _LONGEST_HEADER)))
        fields = json.loads(header["__metadata__"]["fields"])
        return fields["from"], fields["round"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _read(path: Path) -> ClientReply:
    """Read a reply. Raises ``StateError`` if the file is truncated or altered."""
    data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() != path.stem:
        raise StateError(f"{path} is truncated or was altered: its SHA-256 is not its name")
    try:
        header = json.loads(data[_LENGTH : _LENGTH + int.from_bytes(data[:_LENGTH], "little")])
        fields = json.loads(header["__metadata__"]["fields"])
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        for key, tensor in load_tensors(data).items():
            part, _, name = key.partition(":")
            parts[part][name] = tensor
        client = fields["from"]
        reply = Reply(
            **{name: fields[name] for name in _FIELDS},
            exchange=fields.get("exchange", 0),  # older versions had one
            sent=unflatten_coded(parts["sent"]),
            head=parts["head"],
            control=parts["control"],
        )
    except (ValueError, KeyError, TypeError, SafetensorError) as error:  # a file of another version
        raise StateError(f"{path} is not a reply: {error}") from None
    return ClientReply(client=client, reply=reply, start=products_in(unflatten(parts["start"])))
