"""Settings as TOML, and the comparison of two of them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args

import tomli_w

from fedsmoothlora.config.defaults import defaults
from fedsmoothlora.config.model import Sections
from fedsmoothlora.config.paths import PATHS, absolute
from fedsmoothlora.config.renamed import RENAMED, translated
from fedsmoothlora.methods import Method
from fedsmoothlora.modeling.settings import ALL_LINEAR, LayerRole

# Keys and sections that may change between a run and its resumption, since they change no result.
_NO_MATHEMATICS = (
    "name",
    "description",
    "method.preset",  # the keys that it filled in are compared
    "checkpoint",
    "tracking",
    "flower.nodes",
    "flower.timeout",
    "flower.wait",
    "flower.warm",
    "machine.jobs",
    "machine.keep_weights",
)

CLIENTS = "flower.clients"
_LAYERS = "lora.target_modules"
_REPLACED = set(get_args(LayerRole)) - {ALL_LINEAR}


def to_toml(settings: Sections) -> str:
    """Settings as TOML with all defaults; `fedsmoothlora.config.read` reads that of a configuration."""
    shared = {part.name for part in fields(Sections)}
    # The model and the data first, then the sections that all settings have.
    names = sorted((part.name for part in fields(settings)), key=lambda name: name in shared)
    table = {name: _toml_value(getattr(settings, name)) for name in names}
    # Plain keys come first: in TOML, keys below a section's header belong to the section.
    return tomli_w.dumps(dict(sorted(table.items(), key=lambda item: isinstance(item[1], dict))))


def _toml_value(value: Any) -> Any:
    """A section as a table. Keys that are not set are left out, since TOML has no value for them."""
    if isinstance(value, Method):
        found = {"name": value.name, **value.options()}
    elif is_dataclass(value):
        found = {part.name: getattr(value, part.name) for part in fields(value)}
    else:
        return list(value) if isinstance(value, tuple) else value
    return {
        key: list(one) if isinstance(one, tuple) else one for key, one in found.items() if one is not None
    }


def first_difference(
    mine: str,
    theirs: str,
    ignoring: Sequence[str] = (),
    *,
    renamed: Mapping[str, str] = RENAMED,
    before_planning: bool = False,
) -> str | None:
    """The first key in which two settings differ and that can change results; None if there is none.

    A relative path equals the absolute path of the same file. A key that one of them lacks, because it was
    written by another version, has its default. Without ``flower.clients``, the clients are those that the
    partition gives, which both have in common.

    Args:
        mine: settings as TOML.
        theirs: other settings as TOML, possibly written by an older version of the package.
        ignoring: dotted keys and sections that may differ too.
        renamed: new dotted keys by old ones.
        before_planning: one of them may name roles of layers where the other, written by a run, has the names
            of its model's layers; these are not compared.
    """
    tables = [translated(tomllib.loads(text), renamed) for text in (mine, theirs)]
    one, other = (_comparable(defaults(tables[0]) | flat(table)) for table in tables)
    free = (*_NO_MATHEMATICS, *ignoring)
    keys = [key for key in sorted(one.keys() | other.keys()) if not _within(key, free)]
    differing = (key for key in keys if one.get(key) != other.get(key))
    for key in differing:
        if key == CLIENTS and not (one.get(key) and other.get(key)):
            continue
        if before_planning and key == _LAYERS and _has_role(one.get(key)) != _has_role(other.get(key)):
            continue
        return key
    return None


def _comparable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, with absolute paths."""
    return {**values, **{key: absolute(values[key]) for key in PATHS if key in values}}


def _has_role(targets: object) -> bool:
    """Whether ``lora.target_modules`` has a role that a run replaces by names."""
    return isinstance(targets, list) and any(entry in _REPLACED for entry in targets)


def _within(key: str, parts: Sequence[str]) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
