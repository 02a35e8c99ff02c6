"""The page of a run: its sections, each made of the metrics that were recorded, or left out."""

from __future__ import annotations

from fedsmoothlora.reports.blocks import Page, Section
from fedsmoothlora.reports.reading import RecordedRun
from fedsmoothlora.reports.rendering import render
from fedsmoothlora.reports.sections.clients import clients
from fedsmoothlora.reports.sections.configuration import environment, log, settings
from fedsmoothlora.reports.sections.confusion import confusion
from fedsmoothlora.reports.sections.costs import communication, time
from fedsmoothlora.reports.sections.curves import curves
from fedsmoothlora.reports.sections.diagnostics import diagnostics
from fedsmoothlora.reports.sections.header import facts, highlights, not_private, unfinished
from fedsmoothlora.reports.sections.partition import partition

# Id, title and content of every section, in their order on the page.
_SECTIONS = (
    ("curves", "Learning curves", curves),
    ("clients", "Clients", clients),
    ("partition", "Partition", partition),
    ("bytes", "Bytes", communication),
    ("seconds", "Time", time),
    ("confusion", "Classes", confusion),
    ("diagnostics", "Diagnostics", diagnostics),
    ("settings", "Settings", settings),
    ("environment", "Environment", environment),
    ("log", "Log", log),
)


def page(run: RecordedRun) -> str:
    """The whole page as HTML. A section with nothing to show is left out."""
    name = str(run.config.get("name") or run.folder.name)
    sections = [Section(key, title, blocks) for key, title, write in _SECTIONS if (blocks := write(run))]
    return render(
        Page(
            title=f"{name}: report of a run",
            heading=name,
            description=" ".join(str(run.config.get("description") or "").split()),
            warning=" ".join(filter(None, [not_private(run), unfinished(run)])),
            facts=facts(run),
            highlights=highlights(run),
            sections=sections,
            footer=_footer(run),
        )
    )


def _footer(run: RecordedRun) -> str:
    lost = run.metrics.unreadable
    note = ""
    if lost:
        note = f"{lost:,} line{'s' if lost != 1 else ''} of metrics.jsonl could not be read and " + (
            "are left out. " if lost != 1 else "is left out. "
        )
    return f"{note}Every number is from the run’s own files; a dash was not measured."
