"""Generated parts of documents, each between two markers, such as the tables of docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import Row
from fedsmoothlora.storage.files import write_text


def write_table(page: Path, name: str, rows: Sequence[Row], threads: int) -> None:
    """Put a benchmark's rows between its markers, as `write_between`."""
    write_between(page, name, table(rows, threads))


def write_between(page: Path, name: str, text: str) -> None:
    """Put a text between ``<!-- name -->`` and ``<!-- /name -->``.

    Raises ``ValueError`` unless the page has both markers once, in this order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    whole = page.read_text(encoding="utf-8")
    before, found, rest = whole.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed or begin in rest or end in after:
        raise ValueError(f"{page} needs the lines {begin} and {end}, once each and in this order")
    write_text(page, f"{before}{begin}\n{text}\n{end}{after}")


def table(rows: Sequence[Row], threads: int) -> str:
    """Rows as a Markdown table."""
    lines = [
        f"| {threads} threads | value | against | ratio | target |"
        if threads != 1
        else "| 1 thread | value | against | ratio | target |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.value:.4g} {row.unit} | {row.against:.4g} {row.unit} "
        f"| {row.ratio:.3g} | {row.target} |"
        for row in rows
    ]
    return "\n".join(lines)
