"""Write docs/configuration.md, the reference of all keys of a configuration: ``make docs``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedsmoothlora.config.reference import Key, Section, sections

_INTRODUCTION = """\
# Configuration

This page is written by `make docs` from the settings' docstrings, and a test compares it with the code.

A configuration is a TOML file. It needs `name`, `model.source` and `data.source`; the other keys have
defaults, except those that a partition requires. A default in parentheses is that of a task. Unknown keys
are refused.

- `fedsmoothlora show quickstart` prints a complete example.
- `fedsmoothlora init` writes a file to start from, also for your own data.
- `fedsmoothlora config SECTION.KEY` prints an entry of this page.
- `fedsmoothlora run my.toml --set SECTION.KEY=VALUE` replaces a value, and `--set SECTION.KEY=`
  removes it, so that the key has its default."""


def document() -> str:
    """The whole of docs/configuration.md."""
    parts = [_INTRODUCTION, *(part for section in sections() for part in _section(section))]
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f"## {f'`[{section.name}]`' if section.name else 'Top-level keys'}"
    yield _sentence(section.summary)
    chosen = [group for group in section.groups if group.condition]
    yield from (_table(group.keys) for group in section.groups if not group.condition)
    if chosen:
        yield _rows(("", "meaning"), [(f"`{group.condition}`", _plain(group.summary)) for group in chosen])
    for group in chosen:
        if group.keys:
            yield f"### `{group.condition}`"
            yield _table(group.keys)


def _table(keys: Sequence[Key]) -> str:
    rows = [
        (
            f"`{key.name}`",
            f"{key.type}: {key.allowed}" if key.allowed else key.type,
            key.default,
            _sentence(key.meaning),
        )
        for key in keys
    ]
    return _rows(("key", "type", "default", "meaning"), rows)


def _rows(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    text = _plain(text)
    return text[:1].upper() + text[1:]


def _plain(text: str) -> str:
    """A docstring's text in Markdown."""
    return text.replace("``", "`")


if __name__ == "__main__":
    print(document(), end="")
