"""Hooks of ``mkdocs.yml``: files outside ``docs/`` join the site, which must need no network."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from tools import site_links

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside ``docs/`` that pages link to."""
    for path in site_links.outside(ROOT):
        place = f"{site_links.FOLDER}/{path}"
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to files outside ``docs/``, and end HTML comments with an empty line.

    Python-Markdown would take what follows such a comment for HTML.
    """
    name = page.file.src_uri
    outside = name.startswith(f"{site_links.FOLDER}/")
    place = name.removeprefix(f"{site_links.FOLDER}/") if outside else f"docs/{name}"
    markdown = re.sub(r"^(<!-- .* -->)$\n", r"\1\n\n", markdown, flags=re.MULTILINE)
    return site_links.on_the_site(markdown, place)


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that would fetch anything from another host."""
    site = Path(config.site_dir)
    found = {
        path.relative_to(site).as_posix(): external
        for path in sorted(site.rglob("*"))
        if (external := _external(path))
    }
    if found:
        raise PluginError("the site needs a network: " + "; ".join(f"{p}: {e}" for p, e in found.items()))


def _external(path: Path) -> list[str]:
    if path.suffix == ".html":
        return site_links.external_resources(path.read_text(encoding="utf-8"))
    return site_links.external_styles(path.read_text(encoding="utf-8")) if path.suffix == ".css" else []
