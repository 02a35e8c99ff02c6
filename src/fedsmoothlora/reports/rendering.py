"""Pages as HTML, by Jinja2: every text is escaped, and a name that a template lacks is an error."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedsmoothlora.reports.blocks import Chart, Note, Page, Table
from fedsmoothlora.reports.charts.palette import DARK, LIGHT
from fedsmoothlora.reports.formats import printable


def render(page: Page) -> str:
    """The page as one HTML document that needs no other file.

    Control characters in a text are shown as escapes, such as ``\\n``.
    """
    return _environment().get_template("document.html.jinja").render(page=page, light=LIGHT, dark=DARK)


def render_overview(
    title: str, charts: Sequence[Chart], table: Table, notes: Sequence[Note], link: str
) -> str:
    """A part of a page, with all its colours and sizes in itself. ``link`` is the address of the report."""
    template = _environment().get_template("overview.html.jinja")
    return template.render(title=title, charts=charts, table=table, notes=notes, link=link, light=LIGHT)


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("fedsmoothlora.reports"),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _printable(value: object) -> object:
    # Markup is what templates and charts have made, out of texts that passed here or `charts.labels`.
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
