"""docs/results.md: its tables, each between two markers, and its figures. The prose is by hand."""

from __future__ import annotations

from pathlib import Path

from benchmarks.study import tables
from benchmarks.study.figures import write_figure
from benchmarks.study.records import RESULTS, Records
from benchmarks.study.setting import ORDER, read_setting
from benchmarks.study.tables import Findings
from benchmarks.tables import write_between

_TABLES = {
    "quality": tables.quality,
    "ahead": tables.ahead,
    "ablations": tables.ablations,
    "speed": tables.speed,
    "smoothness": tables.smoothness,
}


def all_findings(results: Path = RESULTS) -> list[Findings]:
    """What was recorded of every scenario of every setting, in order of importance."""
    return [
        Findings(setting, scenario, Records(results / setting.name / scenario))
        for setting in map(read_setting, ORDER)
        for scenario in setting.scenarios
    ]


def contents(results: Path = RESULTS) -> dict[str, str]:
    """Every table by the name of its markers; those of scenarios of which something was run."""
    findings = all_findings(results)
    found = {"summary": tables.summary_table(findings), "left": tables.left(findings)}
    for one in findings:
        if one.ours() and one.baselines():
            for name, table in _TABLES.items():
                found[f"{one.setting.name} {one.scenario} {name}"] = table(one)
    return found


def write_page(page: Path, results: Path = RESULTS) -> None:
    """Write all tables into the page, and the figures beside it.

    Raises ``ValueError`` if the page lacks the markers of a table.
    """
    for name, text in contents(results).items():
        write_between(page, name, text)
    for one in all_findings(results):
        if one.ours() and one.baselines():
            write_figure(one, page.parent / "figures" / f"{one.setting.name}-{one.scenario}.svg")
