"""The partition: rows of every label at every client."""

from __future__ import annotations

from fedsmoothlora.reports import charts
from fedsmoothlora.reports.blocks import Block, Grid, Note, chart
from fedsmoothlora.reports.reading import RecordedRun


def partition(run: RecordedRun) -> list[Block]:
    """The labels of each client, and its rows."""
    partition = run.partition
    if partition is None:
        return []
    sizes = {client: sum(rows) for client, rows in partition.clients.items()}
    shown = charts.shown_clients(partition.clients)
    total = f"{sum(sizes.values()):,} rows of {len(partition.classes):,} classes at {len(sizes):,} clients"
    selected = ""
    if len(shown) < len(sizes):
        selected = f" {len(shown)} of {len(sizes):,} clients, evenly spaced from the largest to the smallest."
    caption = f"Shade: the label’s share of the client’s rows.{selected}"
    caption += charts.grouping_note(len(partition.classes))
    smallest, largest = min(sizes.values()), max(sizes.values())
    drawn = [
        chart(
            charts.partition_heat_map(partition.classes, partition.clients),
            "partition",
            "Labels by client",
            f"Heat map of labels by client: {total}.",
            caption,
        ),
        chart(
            charts.sizes_chart({client: sizes[client] for client in shown}),
            "sizes",
            "Rows by client",
            f"Rows of each client, largest first: from {largest:,} down to {smallest:,}.",
            f"From {smallest:,} to {largest:,} rows a client.{selected}",
        ),
    ]
    left_out = f" {partition.left_out:,} rows were left out." if partition.left_out else ""
    return [Note(f"{total}.{left_out}"), Grid(drawn)]
