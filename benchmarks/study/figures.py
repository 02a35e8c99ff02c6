"""The records as pictures: an overview of each study, and the curves of each scenario."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.study.findings import Findings, bytes_of
from fedsmoothlora.storage.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def overview(all_findings: Sequence[Findings]) -> Figure:
    """FedSmoothLoRA minus the most frequent baselines, as dots with intervals; right of zero it is ahead."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    by_metric: dict[str, list[Findings]] = {}
    for found in all_findings:
        by_metric.setdefault(found.setting.metric, []).append(found)
    counts = [len(group) for group in by_metric.values()]
    run_in = Counter(label for found in all_findings for label in found.baselines())
    baselines = [label for label, count in run_in.items() if 2 * count >= len(all_findings)]
    figure = Figure(figsize=(3 + 2.4 * len(baselines), 2 + 0.6 * sum(counts)), layout="constrained")
    panels = figure.subplots(len(counts), len(baselines), squeeze=False, sharey="row", height_ratios=counts)
    labels = list(dict.fromkeys(label for found in all_findings for label in found.ours()))
    colors = {label: f"C{index}" for index, label in enumerate(labels)}
    for row, (metric, group) in zip(panels, by_metric.items(), strict=True):
        for axes, baseline in zip(row, baselines, strict=True):
            axes.set_xlabel(
                f"{metric}, minus {baseline}'s" if group[0].sign > 0 else f"{baseline}'s {metric}, minus it"
            )
            _draw_differences(axes, group, baseline, colors)
            axes.set_visible(axes is row[0] or any(baseline in found.labels for found in group))
    keys = [Line2D([], [], color=color, marker="o", label=label) for label, color in colors.items()]
    figure.legend(handles=keys, loc="outside upper center", ncols=5)
    return figure


def against_bytes(all_findings: Sequence[Findings], ours: Sequence[str]) -> Figure:
    """The final metric of every method against the bytes of a run, by scenario: up and left is better."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    figure, panels = _panels(len(all_findings))
    for axes, found in zip(panels, all_findings, strict=True):
        for label in (*found.baselines(), *(one for one in ours if one in found.labels)):
            finals = [value for value in found.finals(label) if value is not None]
            if not finals or not (spent := bytes_of(found, label)):
                continue
            color = f"C{ours.index(label)}" if label in ours else "gray"
            mean = fmean(finals)
            spread = [[mean - min(finals)], [max(finals) - mean]]
            axes.errorbar(spent, mean, yerr=spread, fmt="o", color=color, markersize=5)
            axes.annotate(
                label, (spent, mean), xytext=(4, 3), textcoords="offset points", fontsize=6, color=color
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(EngFormatter("B"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("bytes of a run, up and down, of all clients")
        axes.set_ylabel(f"final {found.setting.metric}")
        axes.set_title(found.name, fontsize="medium")
        axes.grid(alpha=0.3)
    keys = [Line2D([], [], color=f"C{index}", marker="o", label=label) for index, label in enumerate(ours)]
    keys.append(Line2D([], [], color="gray", marker="o", label="other methods"))
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys))
    return figure


def by_round(all_findings: Sequence[Findings], shown: Callable[[Findings], Sequence[str]]) -> Figure:
    """The metric by round of a few methods, by scenario, drawn as in `curves`.

    ``shown`` gives the labels of a scenario, in the order in which they take colors; ``full`` is black.
    """
    figure, panels = _panels(len(all_findings))
    for axes, found in zip(panels, all_findings, strict=True):
        for index, label in enumerate(shown(found)):
            color = "black" if label == "full" else f"C{index}"
            _draw_curve(axes, found, label, color=color, linestyle="-")
        axes.set_xlabel("round")
        axes.set_ylabel(found.setting.metric)
        axes.set_title(found.name, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def curves(found: Findings) -> Figure:
    """The metric by round, of FedSmoothLoRA's main variants and of all baselines.

    Means over the seeds, with a band from the lowest to the highest.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, label in enumerate([*found.ours(), *found.baselines()]):
        style = "-" if index < len(found.ours()) else "--"
        _draw_curve(axes, found, label, color=f"C{index % 10}", linestyle=style)
    axes.set_xlabel("round")
    axes.set_ylabel(found.setting.metric)
    axes.set_title(found.name)
    axes.legend(fontsize="small", ncols=2)
    return figure


def write_figure(figure: Figure, file: Path) -> None:
    """Write a figure as SVG. The same figure gives the same bytes."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "\n".join(line.rstrip() for line in text.getvalue().split("\n")))


def _draw_curve(axes: Axes, found: Findings, label: str, *, color: str, linestyle: str) -> None:
    """The mean over the seeds by round, with a band from the lowest to the highest."""
    runs = [run["rounds"].get(found.setting.metric, []) for run in found.of(label)]
    # A run that diverged has fewer rounds.
    by_round = [[value for value in values if value is not None] for values in zip_longest(*runs)]
    rounds = [k for k, values in enumerate(by_round) if values]
    axes.plot(rounds, [fmean(by_round[k]) for k in rounds], linestyle, label=label, color=color)
    lows, highs = ([pick(by_round[k]) for k in rounds] for pick in (min, max))
    axes.fill_between(rounds, lows, highs, color=color, alpha=0.1, linewidth=0)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of two columns, and its first ``count`` panels; the last one is hidden if it is left over."""
    from matplotlib.figure import Figure

    rows = max(1, -(-count // 2))
    figure = Figure(figsize=(11, 1 + 3.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _draw_differences(axes: Axes, group: Sequence[Findings], baseline: str, colors: dict[str, str]) -> None:
    for place, found in enumerate(group):
        ours = found.ours() if baseline in found.labels else []
        for index, label in enumerate(ours):
            one = found.final_difference(label, baseline)
            ends = sorted((found.sign * one.low, found.sign * one.high))
            mean = found.sign * one.mean
            axes.errorbar(
                mean,
                place + 0.6 * ((index + 0.5) / len(ours) - 0.5),
                xerr=[[mean - ends[0]], [ends[1] - mean]],
                fmt="o",
                color=colors[label],
                markersize=4,
            )
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(group)), [found.name for found in group])
    axes.set_ylim(len(group) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x", alpha=0.3)
