"""Makes text from other people and machines safe to show in messages, logs and documents.

Client ids, class names, names of metrics and all other text from a site can hold line breaks, terminal
escapes and megabytes. Such text is shown only through this module.
"""

from __future__ import annotations

from collections.abc import Iterable

_MARKDOWN = "\\`|[]<>&"


def printable(text: str, longest: int = 80) -> str:
    """The text on one line: characters that cannot be printed as escapes, a long text cut.

    Line breaks, terminal escapes and characters that reverse the direction of writing become ``\\n``,
    ``\\x1b``, ``\\u202e``.

    Args:
        text: any text.
        longest: the number of its characters that are kept.
    """
    shown = "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text[:longest]
    )
    return shown if len(text) <= longest else f"{shown}..."


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 round``, ``3 rounds``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(names: Iterable[str], most: int = 5) -> str:
    """A few of the names and the number of the others; ``none`` if there are no names."""
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return (", ".join(map(printable, known[:most])) or "none") + more


def markdown(text: str, longest: int = 200) -> str:
    """The text as Markdown shows it literally, also within a table."""
    return "".join(f"\\{one}" if one in _MARKDOWN else one for one in printable(text, longest))
