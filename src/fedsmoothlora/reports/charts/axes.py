"""A figure with its axes in the page's style, and the parts that all charts have."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fedsmoothlora.reports.charts.labels import add_full_texts
from fedsmoothlora.reports.charts.palette import LIGHT, WIDTH

_MOST_MARKERS = 30
_TWO_DECADES = 100


def new_figure(height: float) -> tuple[Figure, Axes]:
    """A figure of the common width and of this height in inches, with its axes."""
    # The object interface, without pyplot: no global state, and no window system is looked for.
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=LIGHT["paper"])
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


def rounds_below(axes: Axes) -> None:
    """A horizontal axis of rounds."""
    axes.set_xlabel("rounds finished")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    left, right = axes.get_xlim()
    if right - left < 1:  # A single round.
        middle = round((left + right) / 2)
        axes.set_xlim(middle - 1, middle + 1)


def amounts_below(axes: Axes, label: str, *, logarithmic: bool = False) -> None:
    """A horizontal axis of amounts above 0, such as megabytes."""
    axes.set_xlabel(label)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if not logarithmic:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
        return
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    steps = (1, 2, 5) if right < _TWO_DECADES * left else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def add_legend(figure: Figure, axes: Axes, names: Mapping[str, str] = MappingProxyType({})) -> None:
    """A legend above the axes.

    Args:
        figure: the figure.
        axes: its axes, with labelled artists.
        names: full texts of shortened labels.
    """
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(
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
    add_full_texts(legend.get_texts(), [names.get(label, label) for label in labels])


def marker_for(places: Collection[float], marker: str) -> str | None:
    """A marker at every value, where there are few."""
    return marker if len(places) <= _MOST_MARKERS + 1 else None


def finite(values: Iterable[float]) -> list[float]:
    """The values, NaN in place of those that are not finite."""
    return [value if math.isfinite(value) else math.nan for value in values]
