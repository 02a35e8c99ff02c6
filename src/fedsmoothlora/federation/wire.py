"""Messages and replies as what crosses the wire: the bytes of one safetensors file, and plain fields.

Every field of `Message` and `Reply` travels by its type: texts and whole numbers as fields, metrics as fields
``FIELD:NAME``, tensors and products in the file as ``FIELD:NAME``. A new field needs nothing here. What comes
in is read by the same types, and refused where it is not as they say; whether it can be believed is for
`fedsmoothlora.federation.uploads.check_replies` to decide. Nothing is unpickled or evaluated.

A safetensors file begins with a table of names, shapes and places, some 130 bytes a tensor: over 1 % of what
thin factors weigh in bfloat16. The names are alike, so that table travels deflated::

    length of the deflated table, 8 bytes, little-endian | the table, deflated (zlib) | the tensors' bytes
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from safetensors.torch import load
from torch import Tensor

from fedsmoothlora.algebra.coding import Packed
from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.algebra.update import Coded
from fedsmoothlora.errors import WireError
from fedsmoothlora.federation.messages import Message, Reply
from fedsmoothlora.federation.serialization import flatten, serialised, unflatten_coded

Content = TypeVar("Content", Message, Reply)
Field = str | int | float
Kind = Literal["text", "whole number", "metrics", "tensors", "update"]

# Bytes of a safetensors file that say how long its table is.
_LENGTH = 8
# Bytes of the longest table that is read: some 100,000 tensors.
_LARGEST_TABLE = 2**24

_KINDS: dict[Any, Kind] = {
    str: "text",
    int: "whole number",
    Mapping[str, float]: "metrics",
    Mapping[str, Tensor]: "tensors",
    Coded: "update",
}


@dataclass(frozen=True)
class Payload:
    """A message or reply as bytes.

    Attributes:
        tensors: a safetensors file whose table is deflated.
        fields: plain texts and numbers, by name.
    """

    tensors: bytes
    fields: Mapping[str, Field]


def pack(content: Message | Reply) -> Payload:
    """A message or a reply as it is sent."""
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
    """The message or reply of the given type.

    Raises ``WireError`` for bytes that are no such file, for fields and tensors that ``kind`` does not have
    or that are missing, and for fields of another type.
    """
    wanted = kinds(kind)
    values: dict[str, Any] = {
        name: {} for name, how in wanted.items() if how in ("metrics", "tensors", "update")
    }
    for key, value in payload.fields.items():
        name, colon, inner = key.partition(":")
        if wanted.get(name) == "metrics" and colon:
            if type(value) not in (int, float):
                raise WireError(f"its metric {inner!r} is {_shown(value)}; it must be a number")
            values[name][inner] = value
        elif key in wanted and key not in values:
            right = {"text": str, "whole number": int}[wanted[key]]
            if type(value) is not right:
                raise WireError(f"its {key} is {_shown(value)}; it must be a {wanted[key]}")
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
    """How each field of a message or a reply travels, by its name.

    Raises ``TypeError`` for a field of a type that has no form on the wire.
    """
    found: dict[str, Kind] = {}
    for name, hint in get_type_hints(content).items():
        kind = next((how for known, how in _KINDS.items() if _same(known, hint)), None)
        if kind is None:
            raise TypeError(f"{content.__name__}.{name}: {hint} has no form on the wire")
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
    except Exception as error:  # whatever bytes make the reader fail
        raise WireError(f"its {len(data)} bytes of tensors are no safetensors file: {error}") from None


def _deflated(file: bytes) -> bytes:
    """A safetensors file with its table deflated."""
    end = _LENGTH + int.from_bytes(file[:_LENGTH], "little")
    table = zlib.compress(file[_LENGTH:end], level=9)
    return b"".join((len(table).to_bytes(_LENGTH, "little"), table, memoryview(file)[end:]))


def _inflated(data: bytes) -> bytes:
    """The inverse of `_deflated`. Raises ``ValueError`` or ``zlib.error`` for anything else.

    A small table may not grow without bound: it is read up to ``_LARGEST_TABLE`` bytes and refused beyond.
    """
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    if end > len(data):
        raise ValueError(f"its table should end at byte {end}")
    reader = zlib.decompressobj()
    table = reader.decompress(data[_LENGTH:end], _LARGEST_TABLE)
    if not reader.eof or reader.unused_data:
        raise ValueError(f"its table is cut off, or longer than {_LARGEST_TABLE} bytes")
    return b"".join((len(table).to_bytes(_LENGTH, "little"), table, memoryview(data)[end:]))


def _products(name: str, tensors: Mapping[str, Tensor]) -> dict[str, LowRank | Tensor | Packed]:
    """Products from their factors, and packed values, where all parts are there and fit together."""
    try:
        update = unflatten_coded(tensors)
        whole = flatten(update).keys() == tensors.keys()
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):
        whole = False
    if not whole:
        raise WireError(f"the factors of its {name} do not make products: {', '.join(sorted(tensors)[:5])}")
    return update


def _shown(value: object) -> str:
    """A value as a reason shows it: short, on one line."""
    if type(value) in (str, int, float, bool):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:80]}..."
    return f"of type {type(value).__name__}"
