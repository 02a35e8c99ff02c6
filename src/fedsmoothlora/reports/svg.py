"""A matplotlib figure as SVG inside a page: it follows the page's colours and clashes with no other chart."""

from __future__ import annotations

import io
import re
import warnings

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from fedsmoothlora.reports.charts.labels import full_text_of
from fedsmoothlora.reports.charts.palette import LIGHT

_NAME_OF = {code: name for name, code in LIGHT.items()}
_TAG = re.compile(r"<[^>]+>")
_COLOUR = re.compile("|".join(_NAME_OF))
_REFERENCE = re.compile(r'(?:xlink:href="#|url\(#)([^")]+)')
_GEOMETRY = re.compile(r'(?<=\s)(d|x|y)="([^"]*)"')
_NUMBER = re.compile(r"-?\d+\.\d+")


def inline(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an ``<svg>`` element, with the full texts of shortened labels as titles.

    matplotlib has escaped the texts in it.

    Args:
        figure: with the colours of `charts.LIGHT`.
        name: unique on the page; every id in the chart begins with it.
        description: a text in place of the chart.
    """
    buffer = io.StringIO()
    # Ids from a salt and no date: equal figures are equal to the byte.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "fedsmoothlora"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The text is drawn by the reader's browser, which has other letters than matplotlib's font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # The style would reach the whole page, and the metadata names addresses.
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", text, flags=re.DOTALL)
    used = {match[1] for tag in _TAG.findall(text) for match in _REFERENCE.finditer(tag)}
    text = _TAG.sub(lambda match: _tag(match[0], name, used), text)
    view = re.search(r'viewBox="[^"]+"', text)
    assert view is not None
    drawing = Markup(re.sub(r"\s*\n\s*", "\n", text[text.index(">") + 1 :]).strip())
    return Markup('<svg {} role="img" aria-label="{}">{}').format(Markup(view[0]), description, drawing)


def _tag(tag: str, name: str, used: set[str]) -> str:
    """A tag with the page's colours, ids of its own, and coordinates as fine as an eye can see."""
    if (full := full_text_of(tag)) is not None:
        return Markup("<g><title>{}</title>").format(full)
    tag = re.sub(r'\sid="([^"]*)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", tag)
    tag = tag.replace('xlink:href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    tag = _COLOUR.sub(lambda match: f"var(--{_NAME_OF[match[0]]})", tag)
    return _GEOMETRY.sub(lambda match: f'{match[1]}="{_shortened(match[2])}"', tag)


def _shortened(numbers: str) -> str:
    numbers = _NUMBER.sub(lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."), numbers)
    return " ".join(numbers.split())
