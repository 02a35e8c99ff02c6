"""docs/results.md: its tables, each between two markers, and its figures. The prose is by hand."""

from __future__ import annotations

from pathlib import Path

from benchmarks.study import tables
from benchmarks.study.figures import curves, overview, write_figure
from benchmarks.study.records import RESULTS, Records
from benchmarks.study.setting import ORDER, read_setting
from benchmarks.study.tables import Findings
from benchmarks.tables import write_between

FIGURES = "figures"
OVERVIEW = "study-overview.svg"

_TABLES = (
    ("Final quality", tables.quality),
    ("FedSmoothLoRA minus each baseline (95 % interval)", tables.ahead),
    ("FedSmoothLoRA's other variants", tables.ablations),
    ("What one part does", tables.parts),
    ("To reach what the baseline has in the end", tables.speed),
    ("Smoothness, and what starts are like", tables.smoothness),
)


def all_findings(results: Path = RESULTS) -> list[Findings]:
    """What was recorded of every scenario of every setting, in order of importance."""
    return [
        Findings(setting, scenario, Records(results / setting.name / scenario))
        for setting in map(read_setting, ORDER)
        for scenario in setting.scenarios
    ]


def contents(results: Path = RESULTS) -> dict[str, str]:
    """What belongs on the page, by the name of its markers."""
    findings = all_findings(results)
    found = {
        "balance": tables.balance(findings),
        "summary": tables.summary_table(findings),
        "left": tables.left(findings),
    }
    return found | {_name(one): section(one) for one in findings}


def section(found: Findings) -> str:
    """All tables of a scenario."""
    if not _can_be_told(found):
        return "Not run yet."
    seeds, setting = found.setting.seeds, found.setting
    tuning = setting.tuning_seeds.get(found.scenario, 1)
    parts = [
        f"{setting.trials} trials of every variant, {tuning} seed{'s' if tuning > 1 else ''} each; seeds "
        f"{seeds[0]} to {seeds[-1]}. Not finished: {', '.join(found.left) or 'none'}.",
        f"![{setting.metric} by round]({FIGURES}/{_figure(found)})",
    ]
    if setting.dropped_after:
        parts[0] += f" Commit `{setting.dropped_after}` can run it again: its options were not kept."
    for title, table in _TABLES:
        if text := table(found):
            parts += [f"**{title}**", text]
    return "\n\n".join(parts)


def write_page(page: Path, results: Path = RESULTS) -> None:
    """Write all tables into the page, and the figures beside it.

    Raises ``ValueError`` if the page lacks the markers of a table.
    """
    for name, text in contents(results).items():
        write_between(page, name, text)
    told = [one for one in all_findings(results) if _can_be_told(one)]
    write_figure(overview([one for one in told if one.is_counted]), page.parent / FIGURES / OVERVIEW)
    for one in told:
        write_figure(curves(one), page.parent / FIGURES / _figure(one))


def _can_be_told(found: Findings) -> bool:
    return bool(found.ours()) and bool(found.baselines())


def _name(found: Findings) -> str:
    return f"{found.setting.name} {found.scenario}"


def _figure(found: Findings) -> str:
    return f"study-{found.setting.name}-{found.scenario}.svg"
