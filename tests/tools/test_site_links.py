"""Links of the documentation's pages, in the repository and on the site."""

import posixpath
import re
from pathlib import Path

import pytest

from tools import site_links

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("place", "link", "moved"),
    [
        ("docs/deploy.md", "privacy.md", "privacy.md"),
        ("docs/deploy.md", "../SECURITY.md", "repository/SECURITY.md"),
        ("docs/deploy.md", "../SECURITY.md#guarantees", "repository/SECURITY.md#guarantees"),
        ("docs/tutorials/chat.md", "../data.md#formats", "../data.md#formats"),
        ("docs/tutorials/chat.md", "../../src/a/b.py", "../repository/src/a/b.py"),
        ("SECURITY.md", "docs/privacy.md", "../privacy.md"),
        ("SECURITY.md", "CONTRIBUTING.md", "CONTRIBUTING.md"),
        ("docs/data.md", "#formats", "#formats"),
        ("docs/data.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("docs/data.md", "mailto:a@example.org", "mailto:a@example.org"),
    ],
)
def test_a_link_leads_to_the_same_file_on_the_site(place: str, link: str, moved: str) -> None:
    assert site_links.on_the_site(f"see [a page]({link}).", place) == f"see [a page]({moved})."


def test_files_outside_docs_are_found_through_each_other(tmp_path: Path) -> None:
    (tmp_path / "docs" / "how-to").mkdir(parents=True)
    (tmp_path / "docs" / "how-to" / "a.md").write_text("[b](../../B.md) [c](../c.md)")
    (tmp_path / "docs" / "c.md").write_text("[d](../src/d.py#L3)")
    (tmp_path / "B.md").write_text("[c](docs/c.md) [e](E.md)")
    (tmp_path / "E.md").write_text("[b](B.md)")
    assert site_links.outside(tmp_path) == ["B.md", "E.md", "src/d.py"]


def test_every_file_that_joins_the_site_is_part_of_the_repository() -> None:
    found = site_links.outside(ROOT)
    assert "SECURITY.md" in found
    assert [path for path in found if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize(
    ("html", "external"),
    [
        ('<script src="https://cdn.example.org/x.js"></script>', ["https://cdn.example.org/x.js"]),
        ('<link rel="stylesheet" href="//fonts.example.org/f.css">', ["//fonts.example.org/f.css"]),
        ('<link href="https://example.org" rel="preconnect" crossorigin>', ["https://example.org"]),
        ('<img src="http://example.org/a.png">', ["http://example.org/a.png"]),
        ('<script src="../assets/x.js"></script><img src="data:image/png;base64,AA">', []),
        ('<a href="https://example.org">a link</a><link rel="canonical" href="https://example.org">', []),
    ],
    ids=["script", "style", "preconnect", "picture", "local", "link"],
)
def test_resources_of_other_hosts_are_found(html: str, external: list[str]) -> None:
    assert site_links.external_resources(html) == external


def test_files_of_other_hosts_are_found_in_style_sheets() -> None:
    css = '@import "https://a.example/x.css"; b { background: url(//b.example/y.png) url(z.png) }'
    assert site_links.external_styles(css) == ["https://a.example/x.css", "//b.example/y.png"]


def test_a_link_of_a_page_in_a_folder_stays_below_the_site() -> None:
    for page in sorted((ROOT / "docs").rglob("*.md")):
        place = page.relative_to(ROOT).as_posix()
        folder = posixpath.dirname(place.removeprefix("docs/"))
        text = site_links.on_the_site(page.read_text(encoding="utf-8"), place)
        for link in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text):
            assert not posixpath.normpath(posixpath.join(folder, link)).startswith("..")
