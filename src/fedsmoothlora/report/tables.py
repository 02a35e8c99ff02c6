"""Text, numbers and tables of a report as HTML; what comes from a file is escaped here."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fedsmoothlora.progress import readable_bytes


def escape(text: object) -> str:
    """Text that is inert in an element and in an attribute."""
    return html.escape(str(text), quote=True)


def number(value: float) -> str:
    """Four decimals, or three digits where that would say nothing; whole numbers whole."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    size = abs(value)
    if value == int(value) and size < 1e12:
        text = f"{value:,.0f}"
    elif 0.001 <= size < 10_000:
        text = f"{value:.4f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "−")


def decimals(value: float) -> str:
    """Four decimals even where a measure happens to be a whole number: ``1.0000``."""
    whole = math.isfinite(value) and value == int(value) and abs(value) < 10_000
    return f"{value:.4f}".replace("-", "−") if whole else number(value)


def seconds(value: float) -> str:
    """Seconds as people say them: ``12.3 s``, ``4 min 05 s``, ``2 h 10 min``."""
    if not math.isfinite(value):
        return number(value)
    if value < 60:
        return f"{value:.3g} s" if value < 10 else f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def measured(value: float, form: Callable[[float], str] = number) -> str:
    """A measured number for people, with the full one beside it for programs."""
    return f'<data value="{value!r}">{escape(form(value))}</data>'


def form_of(name: str) -> Callable[[float], str]:
    """How a figure of this name is written."""
    if name.startswith("bytes_"):
        return _bytes
    if name.startswith("seconds_"):
        return seconds
    if name in ("samples", "clients", "refused"):
        return number
    return decimals


def table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str | None]]],
    *,
    numbers: bool = True,
) -> str:
    """A table that scrolls in its own box.

    Args:
        caption: what it shows.
        columns: headings, the first one of the rows' names.
        rows: each row's name, and its cells: HTML, or None where nothing was measured.
        numbers: the cells are numbers, and stand at the right.
    """
    kind = ' class="number"' if numbers else ""
    first, *others = columns
    head = f'<th scope="col">{escape(first)}</th>'
    head += "".join(f'<th scope="col"{kind}>{escape(column)}</th>' for column in others)
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td{kind}>{'–' if cell is None else cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">\n'
        f"<table><caption><span>{escape(caption)}</span></caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table>\n</div>"
    )


def pairs(caption: str, values: Mapping[str, Any]) -> str:
    """A small table of keys and values."""
    rows = "\n".join(
        f'<tr><th scope="row">{escape(key)}</th><td>{escape(_plain(value))}</td></tr>'
        for key, value in _flat(values)
    )
    return f"<table><caption>{escape(caption)}</caption>\n<tbody>\n{rows}\n</tbody></table>"


def _bytes(value: float) -> str:
    return readable_bytes(value) if math.isfinite(value) else number(value)


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(_plain(one) for one in value) or "none"
    return str(value)
