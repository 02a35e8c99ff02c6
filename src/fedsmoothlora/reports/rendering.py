"""Pages as HTML, by Jinja2: every text is escaped, and a name that a template lacks is an error."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedsmoothlora.reports.blocks import Page
from fedsmoothlora.reports.charts.palette import DARK, LIGHT
from fedsmoothlora.reports.formats import printable


def render(page: Page) -> str:
    """The page as one HTML document that needs no other file.

    Control characters in a text are shown as escapes, such as ``\\n``.
    """
    environment = Environment(
        loader=PackageLoader("fedsmoothlora.reports"),
        autoescape=True,
        finalize=_printable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("document.html.jinja").render(page=page, light=LIGHT, dark=DARK)


def _printable(value: object) -> object:
    # Markup is what templates and charts have made, out of texts that passed here or `charts.labels`.
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value
