"""Messages and replies as they are sent: the bytes of one safetensors file, and plain fields.

The type of a field of `Message` and `Reply` decides how it is sent. Texts and integers are fields, metrics
are fields ``FIELD:NAME``, and tensors and products are in the file as ``FIELD:NAME``. A new field of one of
these types needs no code here. Received content is read by the same types and refused if it does not fit.
`fedsmoothlora.federation.uploads.check_replies` then decides which replies count. Nothing is unpickled or
evaluated.

A safetensors file begins with a table of names, shapes and positions, about 130 bytes for each tensor. That
is over 1 % of the bytes of thin factors in bfloat16. The names are similar, so the table is sent deflated::

    length of the deflated table, 8 bytes, little-endian | the table, deflated (zlib) | the tensors' bytes

The table is checked before any tensor is read, so a hostile file costs no more memory than its own bytes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from safetensors.torch import load
from torch import Tensor

from fedsmoothlora.algebra.coding import Packed
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.errors import WireError
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.payload import Field, Payload
from fedsmoothlora.federation.serialization import flatten, serialised, unflatten_coded
from fedsmoothlora.printable import listed, printable

Content = TypeVar("Content", Message, Reply)
Kind = Literal["text", "integer", "metrics", "tensors", "update"]

# The first bytes of a safetensors file, which hold the length of its table.
_LENGTH = 8
# Limits on received content. The largest models have some 10,000 adapted layers, with two factors each.
_LARGEST_TABLE = 2**24
_MOST_TENSORS = 50_000
_MOST_FIELDS = 1_000

_KINDS: dict[Any, Kind] = {
    str: "text",
    int: "integer",
    Mapping[str, float]: "metrics",
    Mapping[str, Tensor]: "tensors",
    Coded: "update",
}


def pack(content: Message | Reply) -> Payload:
    """Convert a message or a reply to the bytes and fields that are sent."""
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Field] = {}
    for name, kind in kinds(type(content)).items():
        value = getattr(content, name)
        if kind == "metrics":
            fields |= {f"{name}:{key}": float(number) for key, number in value.items()}
        elif kind in ("tensors", "update"):
            tensors |= {f"{name}:{key}": tensor for key, tensor in flatten(value).items()}
        else:
            fields[name] = value
    return Payload(_deflated(serialised(tensors)[0]), fields)


def unpack(kind: type[Content], payload: Payload) -> Content:
    """Convert received bytes and fields to a message or a reply.

    Args:
        kind: `Message` or `Reply`.
        payload: the received content; may be anything.

    Raises:
        WireError: the bytes are no such file, a field or tensor is missing, unknown or of the wrong type, or
            there are too many of them.
    """
    wanted = kinds(kind)
    if len(payload.fields) > _MOST_FIELDS:
        raise WireError(f"it has {len(payload.fields)} fields; there may be {_MOST_FIELDS}")
    values: dict[str, Any] = {
        name: {} for name, how in wanted.items() if how in ("metrics", "tensors", "update")
    }
    for key, value in payload.fields.items():
        name, colon, inner = key.partition(":")
        if wanted.get(name) == "metrics" and colon:
            if type(value) not in (int, float):
                raise WireError(f"its metric {_shown(inner)} is {_shown(value)}; it must be a number")
            values[name][inner] = value
        elif key in wanted and key not in values:
            right = {"text": str, "integer": int}[wanted[key]]
            if type(value) is not right:
                raise WireError(f"its {key} is {_shown(value)}; it must be of type {right.__name__}")
            values[key] = value
        else:
            raise WireError(f"it has an unknown field {_shown(key)}; there are {', '.join(wanted)}")
    for key, tensor in _loaded(payload.tensors).items():
        name, colon, inner = key.partition(":")
        if not colon or wanted.get(name) not in ("tensors", "update"):
            raise WireError(f"its file has an unknown tensor {_shown(key)}")
        values[name][inner] = tensor
    for name, how in wanted.items():
        if how == "update":
            values[name] = _products(name, values[name])
    if missing := [name for name in wanted if name not in values]:
        raise WireError(f"it has no {', '.join(missing)}")
    return kind(**values)


def kinds(content: type) -> Mapping[str, Kind]:
    """How each field of a message or a reply is sent, by its name.

    Raises ``TypeError`` for a field whose type cannot be sent.
    """
    found: dict[str, Kind] = {}
    for name, hint in get_type_hints(content).items():
        kind = next((how for known, how in _KINDS.items() if _same(known, hint)), None)
        if kind is None:
            raise TypeError(f"{content.__name__}.{name}: {hint} cannot be sent")
        found[name] = kind
    return found


def _same(one: Any, other: Any) -> bool:
    return bool(one == other) or (
        get_origin(one) is not None
        and (get_origin(one), get_args(one)) == (get_origin(other), get_args(other))
    )


def _loaded(data: object) -> dict[str, Tensor]:
    if type(data) is not bytes:
        raise WireError(f"its tensors are {_shown(data)}; they must be the bytes of a safetensors file")
    try:
        return load(_inflated(data))
    except Exception as error:  # the reader's errors are of many types
        reason = printable(str(error), longest=200)
        raise WireError(f"its {len(data)} bytes of tensors are no safetensors file: {reason}") from None


def _deflated(file: bytes) -> bytes:
    """A safetensors file with its table deflated."""
    end = _LENGTH + int.from_bytes(file[:_LENGTH], "little")
    table = zlib.compress(file[_LENGTH:end], level=9)
    return b"".join((len(table).to_bytes(_LENGTH, "little"), table, memoryview(file)[end:]))


def _inflated(data: bytes) -> bytes:
    """The inverse of `_deflated`.

    Raises ``ValueError`` or ``zlib.error`` for anything else. The lengths are checked before the bytes are
    copied: that of the deflated table, that of the table, and that of the tensors.
    """
    length = int.from_bytes(data[:_LENGTH], "little")
    end = _LENGTH + length
    if end > len(data):
        raise ValueError(f"its table should end at byte {end}")
    if length > _LARGEST_TABLE:
        raise ValueError(f"its table has {length} bytes; it may have {_LARGEST_TABLE}")
    reader = zlib.decompressobj()
    table = reader.decompress(data[_LENGTH:end], _LARGEST_TABLE)
    if not reader.eof or reader.unused_data:
        raise ValueError(f"its table is cut off, or longer than {_LARGEST_TABLE} bytes")
    _check_table(table, len(data) - end)
    return b"".join((len(table).to_bytes(_LENGTH, "little"), table, memoryview(data)[end:]))


def _check_table(table: bytes, length: int) -> None:
    """Raise ``ValueError`` for too many tensors, or if they do not end with the last of ``length`` bytes."""
    # Counted before the table is parsed: a parsed one is many times as large. Every tensor is an object, and
    # unlike a key, a brace cannot be spelled in another way.
    if (count := table.count(b"{") - 1) > _MOST_TENSORS:
        raise ValueError(f"it has {count} tensors; there may be {_MOST_TENSORS}")
    tensors = [one for name, one in json.loads(table).items() if name != "__metadata__"]
    end = max((int(one["data_offsets"][1]) for one in tensors), default=0)
    if end != length:
        raise ValueError(f"its tensors end at byte {end} of {length}")


def _products(name: str, tensors: Mapping[str, Tensor]) -> dict[str, LowRank | Tensor | Packed]:
    """Products from their factors, and packed values, where all parts are there and fit together."""
    try:
        update = unflatten_coded(tensors)
        whole = flatten(update).keys() == tensors.keys()
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):
        whole = False
    if not whole:
        raise WireError(f"the factors of its {name} do not make products: {listed(sorted(tensors))}")
    return update


def _shown(value: object) -> str:
    """A value in an error message, short and on one line."""
    if type(value) is str:
        return f"'{printable(value)}'"
    if type(value) in (int, float, bool):
        return printable(repr(value))
    return f"of type {type(value).__name__}"
