"""Values from the command line or from Python that replace those of a configuration."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from fedsmoothlora.config.choices import PARTITION
from fedsmoothlora.errors import ConfigError

# An override of one of these keys removes the other.
_ALTERNATIVES = (("training.epochs", "training.steps"), ("participation.clients", "participation.fraction"))


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``training.rounds=20`` into key and value. The value is TOML; a bare word is a string.

    Raises ``ConfigError`` if there is no ``=``.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set {text!r}: write KEY=VALUE, for instance training.rounds=20")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def override(table: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Replace values of a configuration's table.

    A new ``method.name`` removes the options of the old method. A new ``partition.kind`` keeps the old keys
    that it also has.

    Args:
        table: the table; it is changed.
        overrides: values by dotted key.

    Raises:
        ConfigError: a key lies below a value.
    """
    overrides = dict(overrides)
    if "method.name" in overrides:
        _choose_method(table, overrides.pop("method.name"))
    if "partition.kind" in overrides and isinstance(table.get("partition"), dict):
        keys = PARTITION.keys(overrides["partition.kind"])
        table["partition"] = {key: value for key, value in table["partition"].items() if key in keys}
    for key, value in overrides.items():
        _set(table, key, value)
        for one, other in (*_ALTERNATIVES, *(pair[::-1] for pair in _ALTERNATIVES)):
            if key == one and other not in overrides:
                section, _, name = other.partition(".")
                table[section].pop(name, None)


def _choose_method(table: dict[str, Any], name: Any) -> None:
    """Choose another method, with its default options."""
    if not isinstance(table.get("method"), dict) or table["method"].get("name") != name:
        table["method"] = {"name": name}


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {key}: {section} is a value, not a section")
    table[last] = value
