"""The partition: rows of every label at every client."""

from __future__ import annotations

from fedsmoothlora.reports import charts
from fedsmoothlora.reports.blocks import Block, Grid, Note, chart
from fedsmoothlora.reports.reading import RecordedRun


def partition(run: RecordedRun) -> list[Block]:
    partition = run.partition
    if partition is None:
        return []
    sizes = [sum(rows) for rows in partition.clients.values()]
    shown = charts.shown_clients(partition.clients)
    total = f"{sum(sizes):,} rows of {len(partition.classes):,} classes at {len(sizes):,} clients"
    caption = "Shade: the label’s share of the client’s rows."
    if len(shown) < len(sizes):
        caption += f" {len(shown)} of {len(sizes):,} clients, evenly spaced from the largest to the smallest."
    caption += charts.grouping_note(len(partition.classes))
    smallest, largest = min(sizes), max(sizes)
    drawn = [
        chart(
            charts.partition_heat_map(partition.classes, partition.clients),
            "partition",
            "Labels by client",
            f"Heat map of labels by client: {total}.",
            caption,
        ),
        chart(
            charts.sizes_chart(sizes),
            "sizes",
            "Rows by client",
            f"Rows of each client, largest first: from {largest:,} down to {smallest:,}.",
            f"From {smallest:,} to {largest:,} rows a client.",
        ),
    ]
    left_out = f" {partition.left_out:,} rows were left out." if partition.left_out else ""
    return [Note(f"{total}.{left_out}"), Grid(drawn)]
