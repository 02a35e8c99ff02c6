"""Curves of a comparison's page: one line for each variant, with a band over its seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from fedsmoothlora.experiments.results import Results, RunResult
from fedsmoothlora.experiments.tables import four, marked
from fedsmoothlora.reports import charts
from fedsmoothlora.reports.blocks import Chart, chart
from fedsmoothlora.reports.formats import curve_in_words
from fedsmoothlora.reports.metrics import metric
from fedsmoothlora.reports.reading import Series, Spread

# Where variants send amounts this far apart, the cheap ones would be squeezed into the left edge.
_FAR_APART = 5


def lines(results: Results, series: Callable[[RunResult], Series | None]) -> list[charts.Line]:
    """One curve for each variant: the mean over its runs, and a band from the lowest to the highest."""
    found = []
    for label in results.labels:
        curves = [one for run in results.of(label) if (one := series(run))]
        spread, mean = over_seeds(curves)
        if mean:
            band = spread if len(curves) > 1 else None
            found.append(charts.Line(marked(results, label), mean, *_look(results, label), band))
    return found


def over_seeds(found: Sequence[Series]) -> tuple[Spread, Series]:
    """Lowest, mean and highest value by round, over the runs with a finite value in that round."""
    by_round: dict[int, list[float]] = {}
    for series in found:
        for round, value in series.items():
            if math.isfinite(value):
                by_round.setdefault(round, []).append(value)
    rounds = sorted(by_round)
    low, mean, high = ({k: over(by_round[k]) for k in rounds} for over in (min, fmean, max))
    return Spread(low, mean, high), mean


def drawn(lines: Sequence[charts.Line], name: str, title: str, caption: str) -> Chart | None:
    """The curves as a chart; None if there are none."""
    if not lines:
        return None
    told = "; ".join(curve_in_words(line.label, line.points) for line in lines)
    figure = charts.line_chart(lines, legend=True)
    return chart(figure, name, title, f"{title} by round. {told}.", caption)


def quality_by_bytes(results: Results) -> Chart | None:
    """The metric by the bytes sent so far, as a chart; None if nothing was sent.

    Where variants send very different amounts, the axis of bytes is logarithmic and begins after round 1.
    """
    curves = [line for label in results.labels if (line := _by_bytes(results, label))]
    if not curves:
        return None
    most = [max(line.points) for line in curves]
    is_logarithmic = max(most) > _FAR_APART * min(most)
    caption = "Mean over seeds; the band is from the lowest to the highest. Farther left is cheaper."
    if is_logarithmic:
        curves = [_after_the_start(line) for line in curves]
        caption += " The axis of bytes is logarithmic and begins after round 1."
    figure = charts.line_chart(
        curves, xlabel="MB sent so far, up and down, all clients", logarithmic=is_logarithmic, legend=True
    )
    title = f"{metric(results.metric).title} by bytes sent"
    told = "; ".join(
        f"{line.label} reaches {four(list(line.points.values())[-1])} with {max(line.points):.3g} MB"
        for line in curves
    )
    return chart(figure, "bytes", title, f"{title}. {told}.", caption)


def _by_bytes(results: Results, label: str) -> charts.Line | None:
    """The metric of a variant by the mean of the megabytes sent so far; None if it sends nothing."""
    runs = [run for run in results.of(label) if run.metrics.server.get(results.metric)]
    if not runs:
        return None
    rounds = set.intersection(*(set(run.metrics.server[results.metric]) for run in runs))
    spread, mean = over_seeds(
        [{k: run.metrics.server[results.metric][k] for k in sorted(rounds)} for run in runs]
    )
    megabytes = {k: fmean(run.costs[k].bytes for run in runs) / 1e6 for k in mean}
    if not any(megabytes.values()):
        return None

    def moved(series: Series) -> Series:
        return {megabytes[k]: value for k, value in series.items()}  # type: ignore[misc]  # not rounds

    band = Spread(*map(moved, (spread.low, spread.middle, spread.high))) if len(runs) > 1 else None
    return charts.Line(marked(results, label), moved(mean), *_look(results, label), band)


def _after_the_start(line: charts.Line) -> charts.Line:
    """The curve without round 0, when nothing had been sent."""

    def cut(series: Series) -> Series:
        return {x: value for x, value in series.items() if x > 0}

    band = line.band and Spread(*map(cut, (line.band.low, line.band.middle, line.band.high)))
    return replace(line, points=cut(line.points), band=band)


def _look(results: Results, label: str) -> tuple[str, str]:
    """Colour and style of a variant, the same on the whole page."""
    return charts.look(list(results.labels).index(label))
