"""The run's settings, its environment and its log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsmoothlora import tasks
from fedsmoothlora.reports import formats
from fedsmoothlora.reports.blocks import Block, Columns, Folded, Log, Pairs
from fedsmoothlora.reports.reading import RecordedRun


def settings(run: RecordedRun) -> list[Block]:
    """Every setting that the run uses."""
    # The description is at the top of the page.
    used = {key: value for key, value in run.config.items() if key != "description"}
    for key in _unused(run):
        section, _, name = key.partition(".")
        table = used.get(section)
        if isinstance(table, Mapping):
            used[section] = {one: value for one, value in table.items() if name and one != name}
    return _columns(used, "run")


def _unused(run: RecordedRun) -> tuple[str, ...]:
    """Dotted keys, and whole sections, that the run's task or the place of its clients gives no use."""
    kind = run.setting("task", "kind")
    unused = tasks.find(kind).unused_keys if kind in tasks.names() else ()
    return unused if run.setting("flower", "clients") else (*unused, "flower")


def environment(run: RecordedRun) -> list[Block]:
    """The machine and its libraries."""
    return _columns(run.environment or {}, "machine")


def log(run: RecordedRun) -> list[Block]:
    """The end of the log, folded away."""
    title = "The end of run.log"
    return [] if run.log is None else [Folded(title, Log(title, run.log))]


def _columns(table: Mapping[str, Any], general: str) -> list[Block]:
    """A small table of each section, and one called ``general`` of the keys outside of sections."""
    outside = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    sections = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    pairs = [
        Pairs(name, formats.flat_texts(values))
        for name, values in ({general: outside} | sections).items()
        if values
    ]
    return [Columns(pairs)] if pairs else []
