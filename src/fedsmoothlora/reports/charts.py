"""The charts of a report, as matplotlib figures.

Their colours are the light palette, so that they can be saved as any picture; `svg.inline` puts CSS variables
in place of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from fedsmoothlora.reports.reading import Series, Spread

LIGHT = {
    "paper": "#fefefe",
    "ink": "#16242c",
    "mid": "#05090b",
    "quiet": "#52636d",
    "line": "#d3dce1",
    "accent": "#1b6a94",
    "client": "#8fa3af",
    "second": "#b3541e",
    "third": "#2b7d5c",
    "fourth": "#7d4a9c",
    "fifth": "#7c6a12",
}
"""Colours by name on a light page; every one is different, and the name is the CSS variable's."""

DARK = {
    "paper": "#11181d",
    "ink": "#e7eef2",
    "mid": "#05090b",
    "quiet": "#a3b3bd",
    "line": "#2f3c45",
    "accent": "#6dbde6",
    "client": "#6b7d88",
    "second": "#f0a06c",
    "third": "#6ccda4",
    "fourth": "#c9a1e0",
    "fifth": "#d6c463",
}
"""The same names on a dark page."""

WIDE, NARROW = 4.2, 3.3
"""Widths in inches. Small, so that text stays readable where a phone scales the chart to its width."""

MOST_CLASSES = 100
"""Columns of a heat map; of more classes, neighbours are put together."""

_MOST_BARS = 40
_MOST_MARKERS = 30
_MOST_ROWS = 40
_MOST_WITH_NUMBERS = 12
_LEVELS = 20


@dataclass(frozen=True)
class Line:
    """A curve: its name in the legend, values by round, its colour's name, its style, a band around it."""

    label: str
    points: Series
    colour: str = "accent"
    style: str = "-"
    band: Spread | None = None


def line_chart(
    lines: Sequence[Line],
    *,
    ylabel: str = "",
    behind: Mapping[str, Series] | None = None,
    behind_label: str = "",
    band: Spread | None = None,
    band_label: str = "",
    form: Callable[[float], str] | None = None,
    from_zero: bool = False,
    width: float = WIDE,
    xlabel: str = "",
    legend: bool = False,
) -> Figure:
    """Curves by round. A value that is not finite is a gap.

    Args:
        lines: what the chart is about.
        ylabel: of the vertical axis, with its unit.
        behind: thin lines behind, one each client.
        behind_label: what they are together.
        band: a band from the smallest to the largest value behind, with the middle as a thin line.
        band_label: what it is.
        form: writes a number at the vertical axis.
        from_zero: the vertical axis begins at zero.
        width: in inches.
        xlabel: of the horizontal axis, where that is not rounds.
        legend: name even a single curve.
    """
    legend_rows = math.ceil(len(lines) / 2)
    figure, axes = _figure(width, (2.6 if width == WIDE else 2.1) + 0.18 * max(0, legend_rows - 2))
    if band is not None:
        rounds = list(band.middle)
        low, high = _finite(band.low.values()), _finite(band.high.values())
        axes.fill_between(
            rounds, low, high, color=LIGHT["client"], alpha=0.3, linewidth=0, label=f"{band_label}, range"
        )
        axes.plot(
            rounds,
            _finite(band.middle.values()),
            color=LIGHT["client"],
            linewidth=1.2,
            label=f"{band_label}, median",
            marker=_marker(rounds, "."),
        )
    for number, points in enumerate((behind or {}).values()):
        axes.plot(
            list(points),
            _finite(points.values()),
            color=LIGHT["client"],
            linewidth=0.9,
            alpha=0.8,
            marker=_marker(points, "."),
            markersize=3,
            label=behind_label if number == 0 else None,
        )
    for line in lines:
        if line.band is not None:
            low, high = _finite(line.band.low.values()), _finite(line.band.high.values())
            axes.fill_between(
                list(line.band.middle), low, high, color=LIGHT[line.colour], alpha=0.18, linewidth=0
            )
        axes.plot(
            list(line.points),
            _finite(line.points.values()),
            color=LIGHT[line.colour],
            linestyle=line.style,
            linewidth=2,
            label=_text(line.label, 40),
            marker=_marker(line.points, "o"),
            markersize=3.5,
        )
    if xlabel:
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    else:
        _rounds_below(axes)
    axes.set_ylabel(_text(ylabel, 40))
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.8)
    axes.ticklabel_format(axis="y", useOffset=False)
    if form is not None:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    if legend or len(lines) + len(behind or {}) + (band is not None) > 1:
        _legend(figure, axes)
    return figure


def interval_chart(
    rows: Mapping[str, tuple[float, float, float]], *, xlabel: str, width: float = WIDE
) -> Figure:
    """A point with its interval a row, from above; 0 is marked.

    Args:
        rows: middle, low and high by label; low and high are NaN where there is no interval.
        xlabel: of the horizontal axis, with its unit.
        width: in inches.
    """
    figure, axes = _figure(width, 0.9 + 0.3 * len(rows))
    axes.axvline(0, color=LIGHT["quiet"], linewidth=1)
    for place, (middle, low, high) in enumerate(rows.values()):
        if math.isfinite(low) and math.isfinite(high):
            clear = low > 0 or high < 0
            axes.plot([low, high], [place, place], color=LIGHT["accent" if clear else "client"], linewidth=3)
        axes.plot([middle], [place], "o", color=LIGHT["ink"], markersize=5)
    axes.set_yticks(range(len(rows)), [_text(label, 28) for label in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(axis="x", color=LIGHT["line"], linewidth=0.8)
    return figure


def spread_chart(spread: Spread, *, larger_is_better: bool, width: float = WIDE) -> Figure:
    """Worst, median and best client by round, with the band between."""
    figure, axes = _figure(width, 2.6)
    rounds = list(spread.middle)
    low, high = _finite(spread.low.values()), _finite(spread.high.values())
    marker = _marker(rounds, ".")
    best, worst = (high, low) if larger_is_better else (low, high)
    axes.fill_between(rounds, low, high, color=LIGHT["accent"], alpha=0.15, linewidth=0)
    for label, values, colour, width_of_line in (
        ("best", best, "third", 1.2),
        ("median", _finite(spread.middle.values()), "accent", 2),
        ("worst", worst, "second", 1.2),
    ):
        axes.plot(
            rounds,
            values,
            color=LIGHT[colour],
            linewidth=width_of_line,
            marker=marker,
            label=label,
        )
    _rounds_below(axes)
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.8)
    _legend(figure, axes)
    return figure


def stacked_chart(parts: Mapping[str, Series], *, ylabel: str, width: float = WIDE) -> Figure:
    """Parts of a whole by round: stacked bars, or areas where there are too many rounds for bars."""
    figure, axes = _figure(width, 2.6)
    rounds = sorted({round for points in parts.values() for round in points})
    values = [
        [value if math.isfinite(value := points.get(round, 0.0)) else 0.0 for round in rounds]
        for points in parts.values()
    ]
    colours = [LIGHT[name] for name in ("accent", "second", "third", "fourth", "fifth", "client")]
    labels = [_text(label, 40) for label in parts]
    if len(rounds) > _MOST_BARS:
        axes.stackplot(rounds, values, labels=labels, colors=colours, linewidth=0)
    else:
        below = np.zeros(len(rounds))
        for label, part, colour in zip(labels, values, colours, strict=False):
            axes.bar(rounds, part, bottom=below, color=colour, label=label, width=0.7)
            below += part
    _rounds_below(axes)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    _legend(figure, axes)
    return figure


def sizes_chart(sizes: Sequence[int], *, width: float = WIDE) -> Figure:
    """Rows of each client, largest first."""
    figure, axes = _figure(width, 2.6)
    ordered = sorted(sizes, reverse=True)
    if len(sizes) > _MOST_BARS:
        axes.stairs(ordered, np.arange(len(sizes) + 1) + 0.5, fill=True, color=LIGHT["accent"], linewidth=0)
    else:
        axes.bar(range(1, len(sizes) + 1), ordered, color=LIGHT["accent"], width=0.7)
    axes.set_xlabel("clients, largest first")
    axes.set_ylabel("rows")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    return figure


def partition_heat_map(classes: Sequence[str], clients: Mapping[str, Sequence[int]]) -> Figure:
    """Labels by client: one row a client, one column a class.

    The shade is the share of the client's rows, strongest for the largest; the numbers, where there is room
    for them, are rows. Of more than 40 clients, 40 are shown, evenly spaced from the largest to the smallest.
    Of more than 100 classes, neighbours are put together.

    Args:
        classes: names, in the order of the counts.
        clients: rows of each class, by client id.

    Returns:
        A figure to save.
    """
    shown = shown_clients(clients)
    names, groups = _grouped(classes)
    counts = np.asarray([clients[client] for client in shown], dtype=np.int64)  # (clients, classes)
    counts = np.add.reduceat(counts, groups, axis=1)  # (clients, columns)
    totals = counts.sum(axis=1, keepdims=True)
    figure, axes = _figure(WIDE, min(1.0 + 0.26 * len(shown), 6.4))
    strongest = _cells(axes, counts / np.maximum(totals, 1), counts)
    _name_cells(axes.xaxis, names, horizontal=True)
    _name_cells(
        axes.yaxis,
        [f"{_text(c, 12)}  ({n:,})" for c, n in zip(shown, totals[:, 0], strict=True)],
        horizontal=False,
    )
    axes.set_xlabel(f"label (strongest: {strongest:.0%})")
    axes.set_ylabel("client (rows)")
    return figure


def shown_clients(clients: Mapping[str, Sequence[int]]) -> list[str]:
    """The clients that `partition_heat_map` shows: all of them, or 40 from the largest to the smallest."""
    if len(clients) <= _MOST_ROWS:
        return list(clients)
    by_size = sorted(clients, key=lambda client: -sum(clients[client]))
    return [by_size[index] for index in np.linspace(0, len(by_size) - 1, _MOST_ROWS).round().astype(int)]


def confusion_matrix(classes: Sequence[str], matrix: Sequence[Sequence[int]]) -> Figure:
    """True classes by row, predicted classes by column.

    The shade is the share of the true class's rows, strongest for the largest; the numbers, where there is
    room for them, are rows. Of more than 100 classes, neighbours are put together.

    Args:
        classes: names, in the order of the matrix.
        matrix: ``(classes, classes)`` rows of the test set.

    Returns:
        A figure to save.
    """
    names, groups = _grouped(classes)
    counts = np.asarray(matrix, dtype=np.int64)
    counts = np.add.reduceat(np.add.reduceat(counts, groups, axis=0), groups, axis=1)
    figure, axes = _figure(WIDE, 1.2 + min(0.36 * len(names), 3.4))
    strongest = _cells(axes, counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), counts)
    _name_cells(axes.xaxis, names, horizontal=True)
    _name_cells(axes.yaxis, names, horizontal=False)
    axes.set_xlabel(f"predicted (strongest: {strongest:.0%})")
    axes.set_ylabel("true")
    return figure


def text_on(share: float) -> str:
    """The name of a text colour with enough contrast on a cell of this shade, on either kind of page."""
    return "ink" if share < 0.58 else "mid" if share < 0.83 else "paper"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # The object interface, without pyplot: no global state, and no window system is looked for.
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=LIGHT["paper"])
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["quiet"])
    axes.tick_params(color=LIGHT["quiet"], labelcolor=LIGHT["quiet"], labelsize=9.5, length=3)
    axes.tick_params(axis="y", length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(LIGHT["quiet"])
        axis.label.set_fontsize(9.5)
        axis.get_offset_text().set_color(LIGHT["quiet"])
        axis.get_offset_text().set_fontsize(9)
    return figure, axes


def _rounds_below(axes: Axes) -> None:
    axes.set_xlabel("rounds finished")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    left, right = axes.get_xlim()
    if right - left < 1:  # A single round.
        middle = round((left + right) / 2)
        axes.set_xlim(middle - 1, middle + 1)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        # Long names want fewer beside each other.
        ncols=max(1, min(3, int(50 / (max(map(len, labels)) + 5)))),
        frameon=False,
        fontsize=9.5,
        labelcolor=LIGHT["ink"],
        handlelength=1.3,
        columnspacing=1.2,
        borderaxespad=0,
    )


def _cells(axes: Axes, shares: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """Shaded cells: one colour, more or less opaque, so that it suits a light and a dark page.

    Returns the share that is strongest.
    """
    rows, columns = shares.shape
    strongest = float(shares.max())
    levels = np.rint(shares / (strongest or 1) * _LEVELS).astype(int)
    # A little should not look like nothing.
    levels[(levels == 0) & (counts > 0)] = 1
    for level in range(1, levels.max(initial=0) + 1):
        vertices: list[tuple[float, float]] = []
        for row in range(rows):
            for left, right in _runs(levels[row] == level):
                vertices += [(left, row), (right, row), (right, row + 1), (left, row + 1), (left, row)]
        if vertices:
            codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * (
                len(vertices) // 5
            )
            face = (*_rgb("accent"), level / _LEVELS)
            axes.add_patch(PathPatch(Path(vertices, codes), facecolor=face, edgecolor="none", linewidth=0))
    if columns <= _MOST_WITH_NUMBERS and rows <= 2 * _MOST_WITH_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            if count:
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    _short(int(count)),
                    ha="center",
                    va="center",
                    fontsize=8.5 if columns <= 10 else 7.5,
                    color=LIGHT[text_on(float(levels[row, column]) / _LEVELS)],
                )
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(True)
        axes.spines[side].set_color(LIGHT["line"])
    return strongest


def _runs(marked: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Begin and end of every stretch of marked cells."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], marked, [False])).astype(int)))
    return [(int(left), int(right)) for left, right in edges.reshape(-1, 2)]


def _name_cells(axis: Axis, names: Sequence[str], *, horizontal: bool) -> None:
    """Every name, or as many as there is room for."""
    longest = max(len(_text(name)) for name in names)
    fit = 45 // (longest + 1) if horizontal else 40
    upright = horizontal and fit < len(names)
    step = math.ceil(len(names) / (20 if upright else _MOST_ROWS))
    axis.set_ticks(
        [index + 0.5 for index in range(0, len(names), step)],
        [_text(name) if horizontal else _text(name, 24) for name in names[::step]],
        fontsize=8.5 if len(names) <= 25 else 7.5,
        rotation=90 if upright else 0,
    )
    axis.set_tick_params(length=0)


def _grouped(classes: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the columns and where each begins, neighbours together where there are too many classes."""
    step = math.ceil(len(classes) / MOST_CLASSES)
    starts = np.arange(0, len(classes), step)
    if step == 1:
        return list(classes), starts
    names = [f"{classes[start]} …" for start in starts.tolist()]
    return names, starts


def _short(count: int) -> str:
    return f"{count / 1000:.0f}k" if count >= 10_000 else str(count)


def _text(text: str, most: int = 16) -> str:
    """Someone else's text as matplotlib takes it: short, printable, and with no formula in it."""
    text = "".join(char if char.isprintable() else "\ufffd" for char in str(text))
    text = text if len(text) <= most else text[: most - 1] + "…"
    return text.replace("$", r"\$")


def _marker(rounds: Iterable[int], marker: str) -> str | None:
    """A marker at every value, where there are few rounds."""
    return marker if max(rounds, default=0) <= _MOST_MARKERS else None


def _finite(values: Iterable[float]) -> list[float]:
    return [value if math.isfinite(value) else math.nan for value in values]


def _rgb(name: str) -> tuple[float, float, float]:
    code = LIGHT[name]
    return int(code[1:3], 16) / 255, int(code[3:5], 16) / 255, int(code[5:7], 16) / 255
