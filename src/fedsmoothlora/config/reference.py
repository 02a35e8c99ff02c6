"""The reference of all keys of a configuration, from the dataclasses of the settings and their docstrings."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, get_type_hints

from fedsmoothlora import methods, tasks
from fedsmoothlora.config.choices import PARTITION, TASK
from fedsmoothlora.config.in_words import default_of, meanings, one_of, toml, type_of
from fedsmoothlora.config.model import DEFAULT_METHOD, Config
from fedsmoothlora.config.validation import suggestion
from fedsmoothlora.errors import ConfigError

# The order in which a configuration is usually written; the other sections follow.
_FIRST = ("model", "data", "task", "partition", "method", "lora")


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a configuration.

    Attributes:
        name: the key.
        type: its type, in words.
        allowed: the allowed values, in words; empty if every value of the type is.
        default: the default as TOML writes it; ``required`` or ``not set`` where there is none.
        meaning: the text of the docstring.
    """

    name: str
    type: str
    allowed: str
    default: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Group:
    """The keys of a section that belong together: all of them, or those of one method, task or partition.

    Attributes:
        condition: the setting that they belong to, such as ``method.name = "fedit"``; empty if there is none.
        summary: one sentence about that method, task or partition.
        keys: the keys.
    """

    condition: str = ""
    summary: str = ""
    keys: Sequence[Key]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of a configuration.

    Attributes:
        name: the section; empty for the keys above all sections.
        summary: one clause about the section.
        groups: its keys.
    """

    name: str
    summary: str
    groups: Sequence[Group]

    def key_names(self) -> list[str]:
        """The names of all keys, each once."""
        return list(dict.fromkeys(key.name for group in self.groups for key in group.keys))

    def only(self, name: str) -> Section:
        """The section with one key alone.

        Raises ``ConfigError`` that lists the keys there are.
        """
        known = self.key_names()
        if name not in known:
            raise ConfigError(
                f"{self.name}.{name}: unknown key{suggestion(name, known)} "
                f"The keys of [{self.name}] are {', '.join(known)}"
            )
        groups = [replace(one, keys=[key for key in one.keys if key.name == name]) for one in self.groups]
        return replace(self, groups=[group for group in groups if group.keys])


def sections() -> list[Section]:
    """All sections; the first one holds the keys above all sections."""
    hints, summaries = get_type_hints(Config), meanings(Config)
    names = [part.name for part in fields(Config) if is_dataclass(hints[part.name])]
    names.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    plain = [key for key in _keys(Config) if key.name not in names]
    return [
        Section(name="", summary="keys above all sections.", groups=[Group(keys=plain)]),
        *(Section(name=one, summary=summaries[one], groups=_groups(one, hints[one])) for one in names),
    ]


def find(dotted: str) -> Section:
    """The section, or the one key of a section or above all sections, that a dotted name names.

    Raises ``ConfigError`` that lists the sections or the keys there are.
    """
    name, _, key = dotted.partition(".")
    top, *others = sections()
    known = {section.name: section for section in others}
    if name in known:
        return known[name].only(key) if key else known[name]
    if dotted in top.key_names():
        return top.only(dotted)
    names = {key: f"{section.name}.{key}" for section in others for key in section.key_names()}
    names |= {name: name for name in (*known, *top.key_names())}
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {names[close[0]]}?" if close else "."
    raise ConfigError(f"{dotted}: unknown section{hint} The sections are {', '.join(known)}")


@dataclass(frozen=True)
class _Choice:
    """The key of a section that decides about its other keys."""

    key: str
    meaning: str
    default: str
    names: Callable[[], tuple[str, ...]]
    find: Callable[[str], type]


_CHOICES = {
    "method": _Choice("name", "the federated method.", DEFAULT_METHOD, methods.names, methods.find),
    "task": _Choice("kind", "the task.", TASK.default, TASK.names, TASK.find),
    "partition": _Choice(
        "kind", "the rule by which rows are divided.", PARTITION.default, PARTITION.names, PARTITION.find
    ),
}


def _groups(section: str, kind: type) -> list[Group]:
    choice = _CHOICES.get(section)
    if choice is None:
        return [Group(keys=_keys(kind, section))]
    deciding = Key(
        name=choice.key,
        type="string",
        allowed=one_of(choice.names()),
        default=toml(choice.default),
        meaning=choice.meaning,
    )
    return [
        Group(keys=[deciding]),
        *(
            Group(
                condition=f"{section}.{choice.key} = {toml(name)}",
                summary=(choice.find(name).__doc__ or "").strip().partition("\n")[0],
                keys=[key for key in _keys(choice.find(name)) if key.name != choice.key],
            )
            for name in choice.names()
        ),
    ]


def _keys(kind: Any, section: str = "") -> list[Key]:
    hints, texts = get_type_hints(kind, include_extras=True), meanings(kind)
    found = []
    for part in fields(kind):
        if is_dataclass(get_type_hints(kind)[part.name]):
            continue  # a section
        name = part.metadata.get("key", part.name)
        type_, allowed = type_of(hints[part.name])
        found.append(
            Key(
                name=name,
                type=type_,
                allowed=allowed,
                default=default_of(part) + _of_tasks(f"{section}.{name}"),
                meaning=texts.get(part.name, "").removeprefix(f"the key ``{name}``. "),
            )
        )
    return found


def _of_tasks(dotted: str) -> str:
    """The tasks that have another default for a key, with that default, in parentheses."""
    defaults = {name: tasks.find(name).defaults for name in tasks.names()}
    others = [f"{name}: {toml(values[dotted])}" for name, values in defaults.items() if dotted in values]
    return f" ({'; '.join(others)})" if others else ""
