"""Messages and states of secure aggregation as bytes, checked when they are read.

A value is JSON by the types of its fields, with bytes in base64. Masked integers follow the JSON of the rest
of their message as they are. Nothing is unpickled or evaluated.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedsmoothlora.errors import WireError
from fedsmoothlora.printable import printable
from fedsmoothlora.secure_aggregation.fixed_point import FixedPoint
from fedsmoothlora.secure_aggregation.messages import Masked

Value = TypeVar("Value")

_PLAIN = ConfigDict(extra="forbid", strict=True, ser_json_bytes="base64", val_json_bytes="base64")
_LENGTH = 8  # bytes before masked integers, which hold the length of the JSON
_LONGEST = 2**26  # bytes of JSON: the shares of 1,000 sites for each other take less than 1 MB for each site


def dumped(value: object, kind: Any = None) -> bytes:
    """A value as JSON.

    Args:
        value: a message without arrays, a state, or a mapping of them.
        kind: its type; its class unless given, as mappings need.
    """
    known: Any = kind or type(value)
    return bytes(_adapter(known).dump_json(value))


def loaded(kind: type[Value], data: bytes) -> Value:
    """The inverse of `dumped`.

    Args:
        kind: the type of the value.
        data: the bytes; may be anything.

    Raises:
        WireError: they are no value of this type, or too many.
    """
    if len(data) > _LONGEST:
        raise WireError(f"it has {len(data)} bytes; there may be {_LONGEST}")
    known: Any = kind
    try:
        found: Value | None = _adapter(known).validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = printable(".".join(str(part) for part in first["loc"]))
        raise WireError(f"it is no {_name(kind)}: {where}: {first['type']}") from None
    if found is None:
        raise WireError(f"it is no {_name(kind)}: it is empty")
    return found


def dumped_masked(masked: Masked) -> bytes:
    """The message of stage 3."""
    head = dumped(tuple(masked.unusable), tuple[str, ...])
    return b"".join((len(head).to_bytes(_LENGTH, "little"), head, masked.numbers.tobytes()))


def loaded_masked(data: bytes, code: FixedPoint) -> Masked:
    """The inverse of `dumped_masked`.

    Args:
        data: the bytes; may be anything.
        code: the code of the integers.

    Raises:
        WireError: they are no such message, or have another number of integers.
    """
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    size = code.size * code.dtype.itemsize
    if len(data) - end != size:
        raise WireError(f"its masked integers have {max(0, len(data) - end)} bytes; they must have {size}")
    unusable = loaded(tuple[str, ...], data[_LENGTH:end])
    return Masked(numbers=np.frombuffer(data, code.dtype, offset=end), unusable=unusable)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    # pydantic refuses `config` for a dataclass, but passes it on to dataclasses within another type.
    either: Any = kind | None
    return TypeAdapter(either, config=_PLAIN)


def _name(kind: Any) -> str:
    return str(getattr(kind, "__name__", kind))
