"""Links of the documentation: to files outside ``docs/``, and to other hosts.

``docs/`` is read in the repository and as a site. In the repository, pages link to files beside ``docs/``,
such as ``../SECURITY.md``. The site has copies of these files in its folder ``repository/``.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

FOLDER = "repository"
"""The folder of the site with copies of files from outside ``docs/``."""

_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)")


def linked(text: str, place: str) -> set[str]:
    """The files that the page at ``place`` links to, as paths from the root of the repository."""
    return {_resolved(link, place) for link in _LINK.findall(text)}


def outside(root: Path) -> list[str]:
    """All files outside ``docs/`` that pages link to, directly or through one of these files."""
    waiting = [path.relative_to(root).as_posix() for path in sorted((root / "docs").rglob("*.md"))]
    found: set[str] = set()
    while waiting:
        page = waiting.pop()
        text = (root / page).read_text(encoding="utf-8")
        new = {link for link in linked(text, page) if not link.startswith("docs/")} - found
        found |= new
        waiting += sorted(link for link in new if link.endswith(".md"))
    return sorted(found)


def on_the_site(text: str, place: str) -> str:
    """The page's text with its links as they are on the site.

    Args:
        text: Markdown.
        place: the page's path from the root of the repository.
    """
    here = posixpath.dirname(_moved(place))
    return _LINK.sub(lambda link: posixpath.relpath(_moved(_resolved(link[1], place)), here or "."), text)


def external_resources(html: str) -> list[str]:
    """Scripts, styles, fonts and pictures that the page would fetch from other hosts."""
    parser = _Resources()
    parser.feed(html)
    return [link for link in parser.found if re.match(r"(https?:)?//", link)]


def external_styles(css: str) -> list[str]:
    """Files that a style sheet would fetch from other hosts."""
    return re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")\s]+)", css)


def _resolved(link: str, place: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), link))


def _moved(path: str) -> str:
    """The place on the site of a file of the repository."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{FOLDER}/{path}"


class _Resources(HTMLParser):
    """Collects the addresses that a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += self._fetched(tag, dict(attributes))

    @staticmethod
    def _fetched(tag: str, attributes: dict[str, str | None]) -> Iterator[str]:
        if source := attributes.get("src"):
            yield source
        # Links of other kinds, such as "canonical", are not fetched.
        kinds = {"stylesheet", "icon", "preload", "preconnect", "modulepreload", "dns-prefetch"}
        if tag == "link" and kinds & set((attributes.get("rel") or "").split()) and attributes.get("href"):
            yield str(attributes["href"])
