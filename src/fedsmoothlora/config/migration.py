"""An old configuration rewritten with the new names of its keys; comments and formatting stay."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedsmoothlora.config.in_words import toml
from fedsmoothlora.config.renamed import RENAMED, VALUES, is_set, translated
from fedsmoothlora.errors import ConfigError


def migrated(text: str, renamed: Mapping[str, str] = RENAMED) -> str:
    """A configuration's TOML text with the new keys in place of the old ones.

    Lines without an old key stay as they are. The result is read again to make sure that it holds the values
    of the old text under the new keys, and nothing else.

    Args:
        text: the text.
        renamed: new dotted keys, or sections, by old ones.

    Raises:
        ConfigError: the text is not valid TOML, an old key and its new name are both set, or an old key is
            written in a form that cannot be rewritten, such as within an inline table.
    """
    try:
        before = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from None
    present = {old: new for old, new in renamed.items() if is_set(before, old)}
    for old, new in present.items():
        if is_set(before, new):
            raise ConfigError(f"{old} and {new}, its new name, are both set; remove one of them")
    statements = list(_statements(text))
    for old, new in present.items():
        statements = _rename(statements, old, new)
    found = "".join(statement.text for statement in statements)
    if _parsed(found) != translated(before, present):
        pairs = ", ".join(f"{old} to {new}" for old, new in present.items())
        raise ConfigError(f"some keys are not on lines of their own; rename by hand: {pairs}")
    return found


@dataclass(frozen=True)
class _Statement:
    """Lines of a TOML file: the header of a section, a key with its value, or a comment or blank line.

    Attributes:
        text: the lines.
        section: dotted name of the section that they begin or are in; empty above all sections.
        key: the key in that section, possibly dotted; empty for other lines.
    """

    text: str
    section: str
    key: str = ""

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.key}" if self.section else self.key

    @property
    def is_header(self) -> bool:
        return self.text.lstrip().startswith("[")

    @property
    def is_comment(self) -> bool:
        return self.text.lstrip().startswith("#")

    def renamed(self, old: str, new: str) -> str:
        """The text with another name in place of ``old`` in its header or key."""
        return re.sub(rf"^(\s*\[*\s*){re.escape(old)}(?![\w-])", rf"\g<1>{new}", self.text)


def _statements(text: str) -> Iterator[_Statement]:
    section, lines = "", ""
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        lines += line
        table = _parsed(lines)
        if table is None:
            continue  # the first lines of a longer value
        key = _dotted(table)
        if lines.lstrip().startswith("["):
            section, key = key, ""
        yield _Statement(lines, section, key)
        lines = ""


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


def _dotted(table: Any) -> str:
    """The dotted name of the only key or section in a table; empty for an empty table."""
    names = []
    while isinstance(table, Mapping) and len(table) == 1:
        ((name, table),) = table.items()
        names.append(name)
    return ".".join(names)


def _rename(statements: list[_Statement], old: str, new: str) -> list[_Statement]:
    """Statements with a new name in place of an old one, where they have it."""
    if any(one.is_header and _within(one.section, old) for one in statements):
        return [_rename_section(one, old, new) if _within(one.section, old) else one for one in statements]
    at = next((place for place, one in enumerate(statements) if one.key and one.dotted == old), None)
    if at is None:
        return statements
    one = _with_new_value(statements[at], VALUES.get(old, {}))
    statements = [*statements[:at], one, *statements[at + 1 :]]
    key = new.removeprefix(f"{one.section}.")
    stays = not one.section or key != new
    if stays and key.count(".") == one.key.count("."):
        in_place = replace(one, text=one.renamed(one.key, key), key=key)
        return [*statements[:at], in_place, *statements[at + 1 :]]
    return _move(statements, at, new)


def _with_new_value(one: _Statement, values: Mapping[Any, Any]) -> _Statement:
    """The statement of a key with the new value in place of an old one that has another today."""
    value: Any = _parsed(one.text)
    for name in one.key.split("."):
        value = value[name]
    if not isinstance(value, str) or value not in values:
        return one
    # A text without escapes, in either kind of quotes.
    found = re.sub(r"""=(\s*)("[^"\n]*"|'[^'\n]*')""", rf"=\g<1>{toml(values[value])}", one.text, count=1)
    return replace(one, text=found)


def _within(dotted: str, part: str) -> bool:
    return dotted == part or dotted.startswith(f"{part}.")


def _rename_section(one: _Statement, old: str, new: str) -> _Statement:
    text = one.renamed(old, new) if one.is_header else one.text
    return replace(one, text=text, section=new + one.section.removeprefix(old))


def _move(statements: Sequence[_Statement], at: int, new: str) -> list[_Statement]:
    """Statements with a key, and the comments directly above it, moved to the section of its new name."""
    section, _, key = new.rpartition(".")
    start = at
    while start and statements[start - 1].is_comment:
        start -= 1
    rest = [*statements[:start], *statements[at + 1 :]]
    moved = [
        *statements[start:at],
        _Statement(_ended(statements[at].renamed(statements[at].key, key)), section, key),
    ]
    in_section = [n for n, one in enumerate(rest) if one.section == section and (one.key or one.is_header)]
    if section and not in_section:
        moved.insert(0, _Statement(f"\n[{section}]\n", section))
        in_section = [len(rest) - 1]
    end = in_section[-1] + 1 if in_section else 0
    before = [replace(one, text=_ended(one.text)) for one in rest[:end]]
    return [*before, *moved, *rest[end:]]


def _ended(text: str) -> str:
    """Lines of which the last one may lack its end, with that end."""
    return text if text.endswith("\n") else f"{text}\n"
