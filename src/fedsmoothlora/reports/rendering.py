"""Pages as HTML, by Jinja2: every text is escaped, and a name that a template lacks is an error."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedsmoothlora.reports.blocks import Page
from fedsmoothlora.reports.charts.palette import DARK, LIGHT


def render(page: Page) -> str:
    """The page as one HTML document that needs no other file."""
    environment = Environment(
        loader=PackageLoader("fedsmoothlora.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("document.html.jinja").render(page=page, light=LIGHT, dark=DARK)
