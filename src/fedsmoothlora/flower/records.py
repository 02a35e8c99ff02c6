"""Payloads as Flower's records: bytes in an ``ArrayRecord``, texts and numbers in a ``ConfigRecord``.

The safetensors file is one array of bytes, so Flower never interprets its dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedsmoothlora.errors import WireError
from fedsmoothlora.federation.wire import Payload

Status = Literal["done", "diverged", "lost", "spent", "behind", "failed"]
"""How a client's part ended: it is done; its training diverged; its method's state is lost; its privacy is
spent; it lacks server updates and asks for all of them; or it failed for a reason that only the site's own
log has."""


def to_records(payload: Payload | None = None, **tables: Mapping[str, Any]) -> RecordDict:
    """Convert a payload and tables of plain values to records."""
    records = RecordDict({name: ConfigRecord(dict(table)) for name, table in tables.items()})
    if payload is not None:
        size = len(payload.tensors)
        records["tensors"] = ArrayRecord({"file": Array("uint8", (size,), "safetensors", payload.tensors)})
        records["fields"] = ConfigRecord(dict(payload.fields))
    return records


def from_records(records: RecordDict) -> Payload:
    """The payload of received records. Raises ``WireError`` if there is none."""
    arrays = records.array_records.get("tensors")
    if arrays is None or list(arrays) != ["file"]:
        raise WireError("it has no tensors")
    return Payload(tensors=arrays["file"].data, fields=table(records, "fields"))


def table(records: RecordDict, name: str) -> dict[str, Any]:
    """A table of received records. Raises ``WireError`` if there is none."""
    found = records.config_records.get(name)
    if found is None:
        raise WireError(f"it has no {name}")
    return dict(found)


def status_of(records: RecordDict) -> Status:
    """How the client's part ended. Raises ``WireError`` if the records do not say."""
    status = table(records, "status").get("status")
    for known in get_args(Status):
        if status == known:
            return known
    raise WireError("it does not say how the client's part ended")
