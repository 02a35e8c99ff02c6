"""The curves of a scenario as a picture: means over seeds, with a band from the lowest to the highest."""

from __future__ import annotations

import io
from pathlib import Path
from statistics import fmean

from benchmarks.study.tables import Findings
from fedsmoothlora.files import write_text


def write_figure(found: Findings, file: Path) -> None:
    """The metric by round, of FedSmoothLoRA's main variants and of all baselines."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, label in enumerate([*found.ours(), *found.baselines()]):
        runs = [run["rounds"].get(found.setting.metric, []) for run in found.of(label)]
        by_round = [[value for value in values if value is not None] for values in zip(*runs, strict=False)]
        rounds = [k for k, values in enumerate(by_round) if values]
        means = [fmean(by_round[k]) for k in rounds]
        style = "-" if index < len(found.ours()) else "--"
        (line,) = axes.plot(rounds, means, style, label=label, color=f"C{index % 10}")
        lows, highs = ([pick(by_round[k]) for k in rounds] for pick in (min, max))
        axes.fill_between(rounds, lows, highs, color=line.get_color(), alpha=0.1, linewidth=0)
    axes.set_xlabel("round")
    axes.set_ylabel(found.setting.metric)
    axes.set_title(f"{found.setting.name}: {found.scenario}")
    axes.legend(fontsize="small", ncols=2)
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "study", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "\n".join(line.rstrip() for line in text.getvalue().split("\n")))
