"""Write the picture of a run in a terminal from its recorded lines.

``docs/figures/run.txt`` holds the command and the lines that it printed::

    python -m tools.terminal_picture < docs/figures/run.txt > docs/figures/run.svg
"""

from __future__ import annotations

import io
import re
import sys

from rich.console import Console
from rich.text import Text

_COLUMNS = 88
_NAMES = re.compile(r"\b(?:accuracy|loss|up|down)\b")


def picture(lines: str) -> str:
    """The lines as SVG. It names no font of another host, and equal lines give equal bytes."""
    console = Console(
        record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    for line in lines.splitlines():
        console.print(_coloured(line), soft_wrap=False)
    svg = console.export_svg(title="fedsmoothlora", unique_id="run")
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)


def _coloured(line: str) -> Text:
    text = Text(line)
    if line.startswith("$ "):
        text.stylize("bold green")
    elif line.startswith("round "):
        text.highlight_regex(_NAMES, "cyan")
    return text


if __name__ == "__main__":
    print(picture(sys.stdin.read()))
