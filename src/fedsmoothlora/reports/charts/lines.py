"""Curves by round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fedsmoothlora.reports.charts.axes import (
    add_legend,
    amounts_below,
    finite,
    marker_for,
    new_figure,
    rounds_below,
)
from fedsmoothlora.reports.charts.labels import label_text, label_texts
from fedsmoothlora.reports.charts.palette import LIGHT
from fedsmoothlora.reports.reading import Series, Spread


@dataclass(frozen=True)
class Line:
    """A curve: its name in the legend, values by round, its colour's name, its style, a band around it."""

    label: str
    points: Series
    colour: str = "accent"
    style: str = "-"
    band: Spread | None = None


_COLOURS = ("accent", "second", "third", "fourth", "fifth")
_STYLES = ("-", "--", ":", "-.")


def look(place: int) -> tuple[str, str]:
    """Colour and style of the curve at this place, counted from 0; they repeat after 20 curves."""
    return _COLOURS[place % len(_COLOURS)], _STYLES[place // len(_COLOURS) % len(_STYLES)]


def line_chart(
    lines: Sequence[Line],
    *,
    ylabel: str = "",
    behind: Mapping[str, Series] | None = None,
    behind_label: str = "",
    band: Spread | None = None,
    band_label: str = "",
    level: tuple[str, float] | None = None,
    form: Callable[[float], str] | None = None,
    from_zero: bool = False,
    xlabel: str = "",
    logarithmic: bool = False,
    legend: bool = False,
) -> Figure:
    """Curves by round. A value that is not finite is a gap.

    Args:
        lines: the curves of interest.
        ylabel: of the vertical axis, with its unit.
        behind: thin lines behind the curves, one for each client.
        behind_label: their common name in the legend.
        band: a band behind the curves from the smallest to the largest value, with the median as a thin line.
        band_label: its name in the legend.
        level: a name and a value to compare the curves with, drawn as a dashed horizontal line.
        form: writes a number at the vertical axis.
        from_zero: the vertical axis begins at zero.
        xlabel: of the horizontal axis, where that is not rounds.
        logarithmic: the horizontal axis, where that is not rounds, is logarithmic; its values are above 0.
        legend: name even a single curve.
    """
    legend_rows = math.ceil(len(lines) / 2)
    figure, axes = new_figure(2.6 + 0.18 * max(0, legend_rows - 2))
    if band is not None:
        rounds = list(band.middle)
        low, high = finite(band.low.values()), finite(band.high.values())
        axes.fill_between(
            rounds, low, high, color=LIGHT["client"], alpha=0.3, linewidth=0, label=f"{band_label}, range"
        )
        axes.plot(
            rounds,
            finite(band.middle.values()),
            color=LIGHT["client"],
            linewidth=1.2,
            label=f"{band_label}, median",
            marker=marker_for(rounds, "."),
        )
    for number, points in enumerate((behind or {}).values()):
        axes.plot(
            list(points),
            finite(points.values()),
            color=LIGHT["client"],
            linewidth=0.9,
            alpha=0.8,
            marker=marker_for(points, "."),
            markersize=3,
            label=behind_label if number == 0 else None,
        )
    labels = label_texts([line.label for line in lines], 40)
    for line, label in zip(lines, labels, strict=True):
        if line.band is not None:
            low, high = finite(line.band.low.values()), finite(line.band.high.values())
            axes.fill_between(
                list(line.band.middle), low, high, color=LIGHT[line.colour], alpha=0.18, linewidth=0
            )
        axes.plot(
            list(line.points),
            finite(line.points.values()),
            color=LIGHT[line.colour],
            linestyle=line.style,
            linewidth=2,
            label=label,
            marker=marker_for(line.points, "o"),
            markersize=3.5,
        )
    if level is not None:
        name, value = level
        axes.axhline(value, color=LIGHT["quiet"], linewidth=1, linestyle="--", label=label_text(name, 40))
    if xlabel:
        amounts_below(axes, xlabel, logarithmic=logarithmic)
    else:
        rounds_below(axes)
    axes.set_ylabel(label_text(ylabel, 40))
    if from_zero:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.8)
    axes.ticklabel_format(axis="y", useOffset=False)
    if form is not None:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    if legend or len(lines) + len(behind or {}) + (band is not None) + (level is not None) > 1:
        add_legend(figure, axes, dict(zip(labels, (line.label for line in lines), strict=True)))
    return figure


def spread_chart(spread: Spread, *, larger_is_better: bool) -> Figure:
    """Worst, median and best client by round, with the band between."""
    figure, axes = new_figure(2.6)
    rounds = list(spread.middle)
    low, high = finite(spread.low.values()), finite(spread.high.values())
    marker = marker_for(rounds, ".")
    best, worst = (high, low) if larger_is_better else (low, high)
    axes.fill_between(rounds, low, high, color=LIGHT["accent"], alpha=0.15, linewidth=0)
    for label, values, colour, width_of_line in (
        ("best", best, "third", 1.2),
        ("median", finite(spread.middle.values()), "accent", 2),
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
    rounds_below(axes)
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.8)
    add_legend(figure, axes)
    return figure
