"""Counts of two categories as shaded cells: labels by client, predicted by true classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from numpy.typing import NDArray

from fedsmoothlora.reports.charts.axes import new_figure
from fedsmoothlora.reports.charts.labels import name_places
from fedsmoothlora.reports.charts.palette import LIGHT

MOST_CLASSES = 100
"""Columns of a heat map; of more classes, neighbours are put together."""

_MOST_ROWS = 40
_MOST_WITH_NUMBERS = 12
_LEVELS = 20


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
    figure, axes = new_figure(min(1.0 + 0.26 * len(shown), 6.4))
    strongest = _cells(axes, counts / np.maximum(totals, 1), counts)
    name_places(axes.xaxis, names, start=0.5)
    rows = [f"  ({total:,})" for total in totals[:, 0]]
    name_places(axes.yaxis, shown, rows, start=0.5)
    axes.set_xlabel(f"label (strongest: {strongest:.0%})")
    axes.set_ylabel("client (rows)")
    return figure


def shown_clients(clients: Mapping[str, Sequence[int]]) -> list[str]:
    """The clients in a partition's charts: all, or 40 from the largest to the smallest."""
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
        matrix: ``(classes, classes)`` evaluated rows.

    Returns:
        A figure to save.
    """
    names, groups = _grouped(classes)
    counts = np.asarray(matrix, dtype=np.int64)
    counts = np.add.reduceat(np.add.reduceat(counts, groups, axis=0), groups, axis=1)
    figure, axes = new_figure(1.2 + min(0.36 * len(names), 3.4))
    strongest = _cells(axes, counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), counts)
    name_places(axes.xaxis, names, start=0.5)
    name_places(axes.yaxis, names, start=0.5)
    axes.set_xlabel(f"predicted (strongest: {strongest:.0%})")
    axes.set_ylabel("true")
    return figure


def text_on(share: float) -> str:
    """The name of a text colour with enough contrast on a cell of this shade, on either kind of page."""
    return "ink" if share < 0.58 else "mid" if share < 0.83 else "paper"


def _cells(axes: Axes, shares: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """Shaded cells: one colour, more or less opaque, so that it suits a light and a dark page.

    Returns the share that is strongest.
    """
    rows, columns = shares.shape
    strongest = float(shares.max())
    levels = np.rint(shares / (strongest or 1) * _LEVELS).astype(int)
    # The smallest share should not look like none.
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


def _grouped(classes: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the columns and where each begins, neighbours together where there are too many classes."""
    step = math.ceil(len(classes) / MOST_CLASSES)
    starts = np.arange(0, len(classes), step)
    if step == 1:
        return list(classes), starts
    names = [f"{classes[start]} …" for start in starts.tolist()]
    return names, starts


def grouping_note(classes: int) -> str:
    """A sentence for the caption of a heat map of so many classes; empty where each has a column."""
    return " Neighbouring classes are drawn together." if classes > MOST_CLASSES else ""


def _short(count: int) -> str:
    return f"{count / 1000:.0f}k" if count >= 10_000 else str(count)


def _rgb(name: str) -> tuple[float, float, float]:
    code = LIGHT[name]
    return int(code[1:3], 16) / 255, int(code[3:5], 16) / 255, int(code[5:7], 16) / 255
