"""Defaults by dotted key: a key that a configuration leaves out has the value that it always had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

from fedsmoothlora import methods
from fedsmoothlora.config.choices import PARTITION, TASK
from fedsmoothlora.config.model import Config
from fedsmoothlora.errors import FedSmoothLoRAError


def defaults(table: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of the sections of a table, by dotted key; keys that are not set unless given have none.

    Args:
        table: settings, of which the method, the partition and the task decide which keys there are.
    """
    found: dict[str, Any] = {}
    for section, values in table.items():
        kind = _kind(section, values) if isinstance(values, Mapping) else None
        if kind is None:
            continue
        keys = kind.option_names() if issubclass(kind, methods.Method) else {}
        names = {name: key for key, name in keys.items()}
        for part in fields(kind):
            if part.default is not MISSING and part.default is not None:
                value = list(part.default) if isinstance(part.default, tuple) else part.default
                found[f"{section}.{names.get(part.name, part.name)}"] = value
    return found


def _kind(section: str, values: Mapping[str, Any]) -> Any:
    """The dataclass of a section; None where it is unknown, as a method of the user's own is."""
    try:
        if section == "method":
            return methods.find(str(values.get("name")))
        if section in ("partition", "task"):
            choice = PARTITION if section == "partition" else TASK
            return choice.find(str(values.get("kind", choice.default)))
    except FedSmoothLoRAError:
        return None
    kind = get_type_hints(Config).get(section)
    return kind if is_dataclass(kind) else None
