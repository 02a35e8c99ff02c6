"""Values from the command line or from Python that replace those of a configuration."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from fedsmoothlora.config.choices import PARTITION
from fedsmoothlora.errors import ConfigError

# An override of one of these keys removes the other.
_ALTERNATIVES = (("training.epochs", "training.steps"), ("participation.clients", "participation.fraction"))


class Unset:
    """The value of ``KEY=``: the configuration's own value is removed, and the key has its default."""


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``training.rounds=20`` into key and value. The value is TOML; a bare word is a string.

    Nothing is `Unset`; the empty text is ``KEY=''``, with the quotation marks.

    Raises ``ConfigError`` if there is no ``=``.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set {text!r}: write KEY=VALUE, for instance training.rounds=20")
    if not value.strip():
        return key.strip(), Unset()
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
        overrides: values by dotted key; an `Unset` removes the key.

    Raises:
        ConfigError: a key lies below a value, or a key that is to be removed is not set.
    """
    for key in [key for key, value in overrides.items() if isinstance(value, Unset)]:
        _remove(table, key)
    overrides = {key: value for key, value in overrides.items() if not isinstance(value, Unset)}
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


def _remove(table: dict[str, Any], key: str) -> None:
    *sections, last = key.split(".")
    found: Any = table
    for section in sections:
        found = found.get(section) if isinstance(found, dict) else None
    if not isinstance(found, dict) or last not in found:
        raise ConfigError(
            f"--set {key}= removes a key, and the configuration does not set {key}: leave it out. An empty "
            f"text is written with quotation marks: --set {key}=\"''\""
        )
    del found[last]


def _set(table: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {key}: {section} is a value, not a section")
    table[last] = value
