"""Settings as TOML, and the comparison of two of them."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

import tomli_w

from fedsmoothlora import methods
from fedsmoothlora.config.choices import PARTITION, TASK
from fedsmoothlora.config.model import Config, Sections
from fedsmoothlora.config.paths import PATHS, absolute
from fedsmoothlora.config.renamed import RENAMED, translated
from fedsmoothlora.methods import Method

# Keys and sections that may change when a run is resumed, since they change no result.
_NO_MATHEMATICS = ("name", "description", "checkpoint", "tracking", "flower", "machine.jobs")


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
    mine: str, theirs: str, ignoring: Sequence[str] = (), *, renamed: Mapping[str, str] = RENAMED
) -> str | None:
    """The first key in which two settings differ and that can change results; None if there is none.

    A relative path equals the absolute path of the same file. A key that one of them lacks, because it was
    written by another version, has its default.

    Args:
        mine: settings as TOML.
        theirs: other settings as TOML, possibly written by an older version of the package.
        ignoring: dotted keys and sections that may differ too.
        renamed: new dotted keys by old ones.
    """
    one, other = (_comparable(tomllib.loads(text), renamed) for text in (mine, theirs))
    free = (*_NO_MATHEMATICS, *ignoring)
    keys = [key for key in sorted(one.keys() | other.keys()) if not _within(key, free)]
    defaults = _defaults(keys, {**other, **one})

    def value(table: Mapping[str, Any], key: str) -> Any:
        return table.get(key, defaults.get(key))

    return next((key for key in keys if value(one, key) != value(other, key)), None)


def _defaults(keys: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of keys of sections, as TOML has them; keys without one are missing."""
    hints = get_type_hints(Config)
    choices = {"method": "method.name", "partition": "partition.kind", "task": "task.kind"}
    found: dict[str, Any] = {}
    for section in dict.fromkeys(key.partition(".")[0] for key in keys):
        kind = hints.get(section)
        if section in choices:
            kind = _chosen(section, values.get(choices[section]))
        if not is_dataclass(kind):
            continue
        names = {part.metadata.get("key", part.name): part for part in fields(kind)}
        for key, part in names.items():
            default = part.default_factory() if part.default_factory is not MISSING else part.default
            if default is not MISSING and default is not None:
                found[f"{section}.{key}"] = list(default) if isinstance(default, tuple) else default
    return found


def _chosen(section: str, name: object) -> object:
    """The class of a method, partition or task; None where it is not known here."""
    find = {"method": methods.find, "partition": PARTITION.find, "task": TASK.find}[section]
    try:
        return find(str(name))
    except ValueError:
        return None


def _comparable(table: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Values by today's dotted keys, with absolute paths."""
    found = flat(translated(table, renamed))
    return found | {key: absolute(found[key]) for key in PATHS if key in found}


def _within(key: str, parts: Sequence[str]) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in parts)


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found
