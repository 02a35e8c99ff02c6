"""The parts of a page as plain data; the templates turn them into HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup
from matplotlib.figure import Figure

from fedsmoothlora.reports.formats import printable
from fedsmoothlora.reports.svg import inline


@dataclass(frozen=True)
class Number:
    """A measured number: as programs read it, as people read it, and a remark behind it."""

    value: float
    text: str
    note: str = ""


Cell = Number | str | None
"""A cell of a table; None where nothing was measured."""


@dataclass(frozen=True)
class Note:
    """A quiet sentence."""

    text: str
    kind: ClassVar = "note"


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    lines: Sequence[str]
    kind: ClassVar = "bullets"


@dataclass(frozen=True)
class Chart:
    """A drawing with its title and caption. `chart` makes one of a matplotlib figure."""

    title: str
    svg: Markup
    caption: str = ""
    kind: ClassVar = "chart"


@dataclass(frozen=True)
class Table:
    """A table with a heading for each column and each row.

    Attributes:
        caption: the title.
        columns: headings, the first one of the rows' names.
        rows: each row's name and its cells.
        numeric: the cells are numbers, aligned at the right.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    numeric: bool = True
    kind: ClassVar = "table"


@dataclass(frozen=True)
class Pairs:
    """A small table of keys and values."""

    caption: str
    values: Mapping[str, str]
    kind: ClassVar = "pairs"


@dataclass(frozen=True)
class Grid:
    """Charts and tables beside each other where there is room, in full rows of two or three."""

    blocks: Sequence[Chart | Table]
    kind: ClassVar = "grid"

    @property
    def widths(self) -> list[str]:
        """``third`` or ``half`` of a row for each block, so that rows are full; ``whole`` for one block."""
        count = len(self.blocks)
        if count == 1:
            return ["whole"]
        halves = {0: 0, 1: 4, 2: 2}[count % 3]
        return ["third"] * (count - halves) + ["half"] * halves


@dataclass(frozen=True)
class Columns:
    """Small tables beside each other."""

    tables: Sequence[Pairs]
    kind: ClassVar = "columns"


@dataclass(frozen=True)
class Log:
    """The text of a file, line by line."""

    label: str
    text: str
    kind: ClassVar = "log"


@dataclass(frozen=True)
class Folded:
    """A block that is shown when its summary is clicked."""

    summary: str
    block: Table | Log
    kind: ClassVar = "folded"


@dataclass(frozen=True, kw_only=True)
class ListedRun:
    """A row of `Runs`: the run's path below the folder, and its cells."""

    id: str
    cells: Sequence[Cell]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs with links to their pages, of which several can be chosen.

    Attributes:
        columns: headings of the cells.
        rows: the runs of this page of the list.
        page, pages: the number of this page, counted from 1, and of all pages.
    """

    columns: Sequence[str]
    rows: Sequence[ListedRun]
    page: int
    pages: int
    kind: ClassVar = "runs"


Block = Runs | Note | Bullets | Chart | Table | Pairs | Grid | Columns | Log | Folded


@dataclass(frozen=True)
class Highlight:
    """A number at the top of the page."""

    title: str
    value: Number | str
    below: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page that the navigation links to. ``id`` is unique on the page."""

    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page.

    Attributes:
        title: in the browser's title bar.
        heading: at the top.
        description: below the heading; empty where there is none.
        warning: a sentence that a reader should see first; empty where there is none.
        facts: short values by name.
        highlights: the most important numbers.
        sections: in order.
        footer: the last sentence.
    """

    title: str
    heading: str
    description: str = ""
    warning: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)
    highlights: Sequence[Highlight] = ()
    sections: Sequence[Section] = ()
    footer: str = ""


@dataclass(frozen=True, kw_only=True)
class LivePage(Page):
    """A page that is kept up to date. Its sections have the same ids all the time; some may be empty.

    Attributes:
        events: the address of its events.
        is_below_list: whether it links to the list of runs.
    """

    events: str
    is_below_list: bool = False


def chart(figure: Figure, name: str, title: str, description: str, caption: str = "") -> Chart:
    """A matplotlib figure as a chart.

    Args:
        figure: with the colours of `fedsmoothlora.reports.charts.LIGHT`.
        name: unique on the page.
        title: above the drawing.
        description: a text in place of the drawing.
        caption: below the drawing.
    """
    return Chart(title, inline(figure, f"chart-{name.replace('_', '-')}", printable(description)), caption)
