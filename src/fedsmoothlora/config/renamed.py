"""Renamed keys. They are refused in a user's file and translated in the file of an old run."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

RENAMED: Mapping[str, str] = {"transport.dtype": "transport.bits"}
"""The new dotted key of a key, or of a section, by its old one."""

VALUES: Mapping[str, Mapping[Any, Any]] = {"transport.dtype": {"float32": 32, "bfloat16": 16}}
"""The new values of a renamed key by its old ones, for keys whose values changed too."""


def old_keys(table: Mapping[str, Any], renamed: Mapping[str, str] = RENAMED) -> list[str]:
    """A sentence for every old key in a configuration's table, which names the new key."""
    return [
        f"{old} is now called {new}: rename the key{_new_values(old)}, or run `fedsmoothlora migrate FILE`"
        for old, new in renamed.items()
        if is_set(table, old)
    ]


def is_set(table: Mapping[str, Any], key: str) -> bool:
    """Whether a configuration's table has a dotted key."""
    return _section_of(table, key) is not None


def _new_values(old: str) -> str:
    values = [f"{before!r} is now {now!r}" for before, now in VALUES.get(old, {}).items()]
    return f" ({', '.join(values)})" if values else ""


def translated(table: Mapping[str, Any], renamed: Mapping[str, str] = RENAMED) -> dict[str, Any]:
    """A copy of a configuration's table with the new keys in place of the old ones."""
    found = deepcopy(dict(table))
    for old, new in renamed.items():
        section = _section_of(found, old)
        if section is None:
            continue
        value = section.pop(old.rpartition(".")[2])
        *sections, last = new.split(".")
        into = found
        for name in sections:
            into = into.setdefault(name, {})
        into[last] = next((new for before, new in VALUES.get(old, {}).items() if before == value), value)
    return found


def _section_of(table: Mapping[str, Any], key: str) -> Any:
    """The section that contains a dotted key; None if there is no such key."""
    *sections, last = key.split(".")
    inner: Any = table
    for name in sections:
        inner = inner.get(name) if isinstance(inner, Mapping) else None
    return inner if isinstance(inner, Mapping) and last in inner else None
