"""The charts of a report, as matplotlib figures.

Their colours are the light palette, so that they can be saved as any picture; `svg.inline` puts CSS variables
in place of them.
"""

from fedsmoothlora.reports.charts.bars import interval_chart, sizes_chart, stacked_chart
from fedsmoothlora.reports.charts.heat_maps import (
    MOST_CLASSES,
    confusion_matrix,
    grouping_note,
    partition_heat_map,
    shown_clients,
    text_on,
)
from fedsmoothlora.reports.charts.lines import Line, line_chart, look, spread_chart
from fedsmoothlora.reports.charts.palette import DARK, LIGHT

__all__ = [
    "DARK",
    "LIGHT",
    "MOST_CLASSES",
    "Line",
    "confusion_matrix",
    "grouping_note",
    "interval_chart",
    "line_chart",
    "look",
    "partition_heat_map",
    "shown_clients",
    "sizes_chart",
    "spread_chart",
    "stacked_chart",
    "text_on",
]
