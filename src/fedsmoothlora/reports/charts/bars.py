"""Bars of parts and sizes, and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedsmoothlora.reports.charts.axes import add_legend, new_figure, rounds_below
from fedsmoothlora.reports.charts.labels import add_full_texts, label_texts, name_places
from fedsmoothlora.reports.charts.palette import LIGHT
from fedsmoothlora.reports.reading import Series

_MOST_BARS = 40


def stacked_chart(parts: Mapping[str, Series], *, ylabel: str) -> Figure:
    """Parts of a whole by round: stacked bars, or areas where there are too many rounds for bars."""
    figure, axes = new_figure(2.6)
    rounds = sorted({round for points in parts.values() for round in points})
    values = [
        [value if math.isfinite(value := points.get(round, 0.0)) else 0.0 for round in rounds]
        for points in parts.values()
    ]
    names = ("accent", "second", "third", "fourth", "fifth", "client", "quiet", "sixth")
    colours = [LIGHT[name] for name in names]
    labels = label_texts(list(parts), 40)
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
    add_legend(figure, axes, dict(zip(labels, parts, strict=True)))
    return figure


def sizes_chart(sizes: Mapping[str, int]) -> Figure:
    """Rows of each client, the largest client at the top.

    Args:
        sizes: rows by client id.
    """
    ordered = dict(sorted(sizes.items(), key=lambda item: -item[1]))
    figure, axes = new_figure(min(1.0 + 0.26 * len(ordered), 6.4))
    axes.barh(range(len(ordered)), list(ordered.values()), color=LIGHT["accent"], height=0.7)
    for place, rows in enumerate(ordered.values()):
        axes.annotate(
            f"{rows:,}",
            (rows, place),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5 if len(ordered) <= 25 else 7.5,
            color=LIGHT["quiet"],
        )
    name_places(axes.yaxis, list(ordered), start=0)
    axes.set_ylim(len(ordered) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * max(1, *ordered.values()))
    axes.set_xlabel("rows")
    axes.set_ylabel("client")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.grid(axis="x", color=LIGHT["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    return figure


def interval_chart(rows: Mapping[str, tuple[float, float, float]], *, xlabel: str) -> Figure:
    """A point with its interval a row, from above; 0 is marked.

    Args:
        rows: middle, low and high by label; low and high are NaN where there is no interval.
        xlabel: of the horizontal axis, with its unit.
    """
    figure, axes = new_figure(0.9 + 0.3 * len(rows))
    axes.axvline(0, color=LIGHT["quiet"], linewidth=1)
    for place, (middle, low, high) in enumerate(rows.values()):
        if math.isfinite(low) and math.isfinite(high):
            clear = low > 0 or high < 0
            axes.plot([low, high], [place, place], color=LIGHT["accent" if clear else "client"], linewidth=3)
        axes.plot([middle], [place], "o", color=LIGHT["ink"], markersize=5)
    axes.set_yticks(range(len(rows)), label_texts(list(rows), 28))
    add_full_texts(axes.get_yticklabels(), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(axis="x", color=LIGHT["line"], linewidth=0.8)
    return figure
