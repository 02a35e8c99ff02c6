"""The run's settings, its environment and its log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsmoothlora.reports import formats
from fedsmoothlora.reports.blocks import Block, Columns, Folded, Log, Pairs
from fedsmoothlora.reports.reading import RecordedRun


def settings(run: RecordedRun) -> list[Block]:
    # The description is at the top of the page.
    general = {
        key: value
        for key, value in run.config.items()
        if not isinstance(value, Mapping) and key != "description"
    }
    sections = {key: value for key, value in run.config.items() if isinstance(value, Mapping) and value}
    return _columns(({"run": general} if general else {}) | sections)


def environment(run: RecordedRun) -> list[Block]:
    if not run.environment:
        return []
    general = {key: value for key, value in run.environment.items() if not isinstance(value, Mapping)}
    sections = {key: value for key, value in run.environment.items() if isinstance(value, Mapping) and value}
    return _columns(({"machine": general} if general else {}) | sections)


def _columns(sections: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    if not sections:
        return []
    return [Columns([Pairs(key, formats.flat_texts(values)) for key, values in sections.items()])]


def log(run: RecordedRun) -> list[Block]:
    """The end of the log, folded away."""
    title = "The end of run.log"
    return [] if run.log is None else [Folded(title, Log(title, run.log))]
