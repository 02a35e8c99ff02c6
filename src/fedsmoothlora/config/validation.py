"""Check tables with pydantic, and explain its errors."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

Checked = TypeVar("Checked")

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_IN_PLAIN_WORDS = "in_plain_words"


def validate(kind: type[Checked], table: Mapping[str, Any]) -> Checked:
    """Convert a table to the dataclass ``kind``; unknown keys and values of wrong types are refused.

    Raises pydantic's ``ValidationError``, which `problems` explains.
    """
    # In strict mode, pydantic converts mappings to dataclasses and arrays to tuples only from JSON.
    text = json.dumps(table, default=_mapping_or_invalid)
    hashable: Any = kind  # to mypy a class is none
    checked: Checked = _adapter(hashable).validate_json(text)
    return checked


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    # pydantic refuses `config` for a dataclass, but passes it on to dataclasses within another type.
    either: Any = kind | None
    return TypeAdapter(either, config=_STRICT)


def _mapping_or_invalid(value: object) -> object:
    """A mapping as a dictionary. Other objects become a value that no key accepts."""
    return dict(value) if isinstance(value, Mapping) else [[]]


def refusal(*texts: str) -> ValidationError:
    """An error to raise in a validator; `problems` returns its texts unchanged.

    Args:
        texts: each names the key, the problem and the remedy.
    """
    return ValidationError.from_exception_data(
        "refused",
        [
            InitErrorDetails(type=PydanticCustomError(_IN_PLAIN_WORDS, "{text}", {"text": text}), input=None)
            for text in texts
        ],
    )


def problems(
    error: ValidationError,
    kind: type,
    table: Mapping[str, Any],
    section: str = "",
    keys: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Explain pydantic's errors: dotted key, value and reason.

    Args:
        error: the error of ``validate(kind, table)``.
        kind: the dataclass.
        table: the table.
        section: the table's own name in the configuration; empty for a whole configuration.
        keys: keys of the configuration by field name, where the two differ.
    """
    found: list[str] = []
    reasons: dict[str, list[str]] = {}  # by key and value: a union has one reason for each of its types
    for detail in error.errors():
        if detail["type"] == _IN_PLAIN_WORDS:
            found.append(detail["msg"])
            continue
        path = _path(kind, detail["loc"])
        shown = [keys.get(name, name) for name in path]
        dotted = ".".join([section, *shown] if section else shown)
        if detail["type"] == "missing":
            found.append(f"{dotted} is missing")
        elif detail["type"] == "unexpected_keyword_argument":
            found.append(unknown_key(dotted, path[-1], _keys(kind, path[:-1])))
        elif detail["type"] == "dataclass_type":
            found.append(f"{dotted} = {_value(table, path)!r} must be a section, [{dotted}]")
        else:
            reasons.setdefault(f"{dotted} = {_value(table, path)!r}", []).append(_reason(detail))
    return found + [f"{place}: {'; '.join(sorted(set(texts)))}" for place, texts in reasons.items()]


def _path(kind: type, location: Sequence[str | int]) -> list[str]:
    """The keys of an error's location, without the types of a union and the places in an array."""
    first, *rest = map(str, location)
    inner = get_type_hints(kind).get(first)
    if rest and isinstance(inner, type) and is_dataclass(inner):
        return [first, *_path(inner, rest)]
    return [first]


def _keys(kind: type, path: Sequence[str]) -> list[str]:
    """The keys of the section at ``path``."""
    for name in path:
        kind = get_type_hints(kind)[name]
    assert is_dataclass(kind)
    return sorted(part.name for part in fields(kind))


def _value(table: Any, path: Sequence[str]) -> Any:
    for name in path:
        table = table[name]
    return table


def unknown_key(dotted: str, key: str, known: Sequence[str]) -> str:
    """The refusal of a key that does not exist, with the closest one that does."""
    there = f"The keys there are {', '.join(known)}" if known else "There are no keys there"
    return f"{dotted}: unknown key{suggestion(key, known)} {there}"


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a clause about an unknown name: the closest known one as a question, or a full stop."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _reason(detail: ErrorDetails) -> str:
    message = detail["msg"]
    return message[0].lower() + message[1:]
