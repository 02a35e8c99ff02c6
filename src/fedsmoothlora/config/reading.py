"""Read a file, a recipe or a table, with overrides, into one checked `Config`."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from pydantic import ValidationError

from fedsmoothlora import tasks
from fedsmoothlora.config.choices import TASK, checked_method
from fedsmoothlora.config.consistency import contradictions
from fedsmoothlora.config.model import Config, Sections
from fedsmoothlora.config.overrides import override
from fedsmoothlora.config.presets import fill_in_preset
from fedsmoothlora.config.renamed import RENAMED, old_keys, translated
from fedsmoothlora.config.shipped import recipe_text
from fedsmoothlora.config.toml import flat
from fedsmoothlora.config.validation import problems, validate
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.methods import Method

Settings = TypeVar("Settings", bound=Sections)


def read(
    config: str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    renamed: Mapping[str, str] = RENAMED,
) -> Config:
    """Read a configuration.

    Args:
        config: a TOML file, a recipe's name, or a table.
        overrides: values that replace its own, by dotted key: ``{"training.rounds": 3}``. A new
            ``method.name`` begins with that method's defaults. A new ``partition.kind`` keeps the old keys
            that it also has.
        renamed: new dotted keys by old ones; an old key is refused.

    Raises:
        ConfigError: it cannot be read, or has invalid keys or values.
    """
    origin, table = _load(config)
    return _checked(table, overrides, origin, renamed)


def read_run_config(
    file: Path, overrides: Mapping[str, Any] | None = None, *, renamed: Mapping[str, str] = RENAMED
) -> Config:
    """Read the ``config.toml`` of a run's folder, possibly written by an older version of the package.

    Args:
        file: the file.
        overrides: as in `read`; they use the new keys.
        renamed: new dotted keys by old ones; old keys in the file are translated.

    Raises:
        ConfigError: as in `read`.
    """
    origin, table = _load(file)
    return _checked(translated(table, renamed), overrides, origin, renamed)


def set_keys(config: str | Path) -> frozenset[str]:
    """The dotted keys that a TOML file or a recipe sets; all others have their defaults.

    Raises ``ConfigError`` as `read`.
    """
    return frozenset(flat(_load(config)[1]))


def from_table(kind: type[Settings], table: Mapping[str, Any], origin: str) -> Settings:
    """Convert a table to settings, and check keys, types, values and their combinations.

    Args:
        kind: the dataclass of the settings.
        table: sections and keys; a method may be given as an object, another section as an instance of its
            settings class.
        origin: the name of the table in error messages.

    Raises:
        ConfigError: the message names ``origin`` and, for every problem, the key, the value and the remedy.
    """
    if found := list(_misplaced(kind, table)):
        raise _refused(origin, found)
    table = _copy(
        {key: value if isinstance(value, Method) else _as_table(value) for key, value in table.items()}
    )
    fill_in_preset(table)
    plain = {key: value for key, value in table.items() if not isinstance(value, Method)}
    try:
        checked = validate(kind, plain)
        if own := {key: checked_method(table[key]) for key in table.keys() - plain.keys()}:
            checked = replace(cast(Any, checked), **own)
    except ValidationError as error:
        raise _refused(origin, problems(error, kind, plain)) from None
    if found := list(contradictions(checked)):
        raise _refused(origin, found)
    return checked


def _misplaced(kind: type, table: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for every section that is an instance of another section's settings class."""
    wanted = get_type_hints(kind)
    for key, value in table.items():
        given, right = type(value), wanted.get(key)
        if is_dataclass(given) and isinstance(right, type) and not issubclass(given, right):
            yield f"{key} is given as {given.__name__}; it must be {right.__name__}, or a table of its keys"


def _as_table(section: Any) -> Any:
    """A section that is given as an instance of its settings class as a table; other values as they are."""
    if not is_dataclass(section):
        return section
    return {part.name: getattr(section, part.name) for part in fields(section)}


def _checked(
    table: dict[str, Any], overrides: Mapping[str, Any] | None, origin: str, renamed: Mapping[str, str]
) -> Config:
    override(table, overrides or {})
    if found := old_keys(table, renamed):
        raise _refused(origin, found)
    _fill_in(table)
    return from_table(Config, table, origin)


def _refused(origin: str, problems: Sequence[str]) -> ConfigError:
    """One error for all problems: one line, or one line each."""
    if len(problems) == 1:
        return ConfigError(f"{origin}: {problems[0]}")
    return ConfigError("\n  ".join([f"{origin}: {len(problems)} problems", *problems]))


def _fill_in(table: dict[str, Any]) -> None:
    """Fill in the task's defaults for keys that are not set."""
    task = table.get("task")
    kind = task.get("kind", TASK.default) if isinstance(task, dict) else TASK.default
    if kind not in tasks.names():
        return  # it is refused where the section is checked
    for dotted, value in tasks.find(kind).defaults.items():
        name, _, key = dotted.partition(".")
        section = table.setdefault(name, {})
        if isinstance(section, dict):
            section.setdefault(key, value)


def _load(config: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a configuration in error messages, and its table."""
    if isinstance(config, Mapping):
        return "configuration", _copy(config)
    path = Path(config)
    if path.suffix == ".toml" or path.is_file():
        origin, text = str(path), config_text(path)
    else:
        origin, text = f"recipe {config}", recipe_text(str(config))
    try:
        return origin, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{origin}: not valid TOML: {error}") from None


def config_text(path: Path) -> str:
    """The text of a configuration file, with its line endings.

    Raises ``ConfigError`` if it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")  # some editors begin a file with a byte-order mark
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None


def _copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in table.items()}
