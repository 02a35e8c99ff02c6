"""Texts of users as labels of a chart."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from matplotlib.axis import Axis, XAxis
from matplotlib.text import Text

from fedsmoothlora.reports.formats import distinct, printable, shortened

_FULL_TEXT = "full-text-"
# The room for names, beside the rows and upright below the columns.
_MOST_BESIDE, _MOST_BELOW = 40, 20


def label_text(text: str, most: int = 16) -> str:
    """A text as matplotlib takes it: short, printable, and not read as a formula."""
    return _plain(shortened(printable(text), most))


def label_texts(texts: Sequence[str], most: int = 16) -> list[str]:
    """Such labels beside each other: no two texts are shortened to the same one."""
    return [_plain(text) for text in distinct(texts, most)]


def add_full_texts(labels: Iterable[Text], texts: Iterable[str]) -> None:
    """Keep the full text with every label that is shortened."""
    for label, text in zip(labels, texts, strict=True):
        full = printable(text)
        if label.get_text() not in (text, _plain(full)):
            label.set_gid(f"{_FULL_TEXT}{full.encode().hex()}")


def full_text_of(tag: str) -> str | None:
    """The full text that `add_full_texts` put into a tag of an SVG; None if it has none.

    It is there in hexadecimal digits, which no rule of XML and no search for colours can misread.
    """
    found = re.search(rf'\sid="{_FULL_TEXT}([0-9a-f]+)"', tag)
    return None if found is None else bytes.fromhex(found[1]).decode()


def name_places(axis: Axis, names: Sequence[str], endings: Sequence[str] = (), *, start: float) -> None:
    """Write a name at every place ``start``, ``start + 1``, ...; every second or third where they are many.

    Args:
        axis: of the columns or the rows.
        names: in order.
        endings: a text behind each name that is never shortened.
        start: the first place.
    """
    endings = endings or [""] * len(names)
    shown = [f"{name}{end}" for name, end in zip(label_texts(names, 14), endings, strict=True)]
    beside_each_other = 45 // (max(map(len, shown)) + 1)
    upright = isinstance(axis, XAxis) and beside_each_other < len(names)
    step = math.ceil(len(names) / (_MOST_BELOW if upright else _MOST_BESIDE))
    axis.set_ticks(
        [start + place for place in range(0, len(names), step)],
        shown[::step],
        fontsize=8.5 if len(names) <= 25 else 7.5,
        rotation=90 if upright else 0,
    )
    axis.set_tick_params(length=0)
    full = [f"{name}{end}" for name, end in zip(names, endings, strict=True)]
    add_full_texts(axis.get_ticklabels(), full[::step])


def _plain(text: str) -> str:
    return text.replace("$", r"\$")
