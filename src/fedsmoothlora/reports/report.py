"""The report of a run: one self-contained page, and pictures."""

from __future__ import annotations

from pathlib import Path

from fedsmoothlora.reports.reading import read_run
from fedsmoothlora.storage.files import write_text

__all__ = ["write_report"]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and the pictures into the folder of a run, finished or not.

    The page needs no other file and makes no request: it can be sent by post and opened without a network.
    Equal folders give equal pages, to the byte.

    Args:
        folder: the run's folder, with at least ``config.toml`` and ``metrics.jsonl``.

    Returns:
        The path of the page.

    Raises:
        ReportError: ``folder`` is not the folder of a run, or a file in it cannot be read.
    """
    # Here, since matplotlib takes a while to load.
    from fedsmoothlora.reports.page import page
    from fedsmoothlora.reports.pictures import save_pictures

    recorded = read_run(Path(folder))
    save_pictures(recorded, Path(folder))
    path = Path(folder) / "report.html"
    write_text(path, page(recorded))
    return path
