"""Bars, and intervals beside each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedsmoothlora.reports.charts.axes import add_legend, new_figure, rounds_below
from fedsmoothlora.reports.charts.labels import label_text
from fedsmoothlora.reports.charts.palette import LIGHT, WIDE
from fedsmoothlora.reports.reading import Series

_MOST_BARS = 40


def stacked_chart(parts: Mapping[str, Series], *, ylabel: str, width: float = WIDE) -> Figure:
    """Parts of a whole by round: stacked bars, or areas where there are too many rounds for bars."""
    figure, axes = new_figure(width, 2.6)
    rounds = sorted({round for points in parts.values() for round in points})
    values = [
        [value if math.isfinite(value := points.get(round, 0.0)) else 0.0 for round in rounds]
        for points in parts.values()
    ]
    colours = [LIGHT[name] for name in ("accent", "second", "third", "fourth", "fifth", "client")]
    labels = [label_text(label, 40) for label in parts]
    if len(rounds) > _MOST_BARS:
        axes.stackplot(rounds, values, labels=labels, colors=colours, linewidth=0)
    else:
        below = np.zeros(len(rounds))
        for label, part, colour in zip(labels, values, colours, strict=False):
            axes.bar(rounds, part, bottom=below, color=colour, label=label, width=0.7)
            below += part
    rounds_below(axes)
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    add_legend(figure, axes)
    return figure


def sizes_chart(sizes: Sequence[int], *, width: float = WIDE) -> Figure:
    """Rows of each client, largest first."""
    figure, axes = new_figure(width, 2.6)
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


def interval_chart(
    rows: Mapping[str, tuple[float, float, float]], *, xlabel: str, width: float = WIDE
) -> Figure:
    """A point with its interval a row, from above; 0 is marked.

    Args:
        rows: middle, low and high by label; low and high are NaN where there is no interval.
        xlabel: of the horizontal axis, with its unit.
        width: in inches.
    """
    figure, axes = new_figure(width, 0.9 + 0.3 * len(rows))
    axes.axvline(0, color=LIGHT["quiet"], linewidth=1)
    for place, (middle, low, high) in enumerate(rows.values()):
        if math.isfinite(low) and math.isfinite(high):
            clear = low > 0 or high < 0
            axes.plot([low, high], [place, place], color=LIGHT["accent" if clear else "client"], linewidth=3)
        axes.plot([middle], [place], "o", color=LIGHT["ink"], markersize=5)
    axes.set_yticks(range(len(rows)), [label_text(label, 28) for label in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(axis="x", color=LIGHT["line"], linewidth=0.8)
    return figure
