"""The attacks by name: one class in each file of this folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from fedsmoothlora.config import parse_override
from fedsmoothlora.config.validation import problems, validate
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments.attacks.base import Attack
from fedsmoothlora.plugins import PluginFolder

_FOLDER: PluginFolder[Attack] = PluginFolder(
    "fedsmoothlora.experiments.attacks",
    Attack,  # type: ignore[type-abstract]
    "attack",
)


def names() -> tuple[str, ...]:
    """Names of all attacks, sorted."""
    return tuple(_FOLDER.by_name)


def find(name: str) -> type[Attack]:
    """The class of an attack.

    Raises ``ConfigError`` that lists the attacks.
    """
    return _FOLDER.find(name)


def parsed(text: str) -> Attack:
    """``NAME`` or ``NAME:KEY=VALUE:KEY=VALUE``, such as ``scale:factor=20``.

    Options that are no numbers, such as the names of classes, are taken letter by letter.

    Raises ``ConfigError`` for an unknown name or key, or a wrong value.
    """
    name, *options = text.split(":")
    kind = find(name.strip())
    numbers = {part.name for part in fields(kind) if isinstance(part.default, float)}
    table: dict[str, Any] = {"kind": kind.name()}
    for option in options:
        key, value = parse_override(option)
        table[key] = value if key in numbers else option.partition("=")[2]
    return from_table(table)


def from_table(table: Mapping[str, Any]) -> Attack:
    """The opposite of ``Attack.table``.

    Raises ``ConfigError`` for an unknown name or key, or a wrong value.
    """
    kind = find(str(table.get("kind")))
    try:
        return validate(kind, table)
    except ValidationError as error:
        raise ConfigError("; ".join(problems(error, kind, table, kind.name()))) from None
