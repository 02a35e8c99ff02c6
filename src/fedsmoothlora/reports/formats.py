"""Numbers and settings of a report as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fedsmoothlora.reports.metrics import metric
from fedsmoothlora.reports.reading import Series


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


def form_of(name: str) -> Callable[[float], str]:
    """How the values of a metric are written, by its unit."""
    unit = metric(name).unit
    if unit == "bytes":
        return _bytes
    if unit == "seconds":
        return seconds
    return number if unit else decimals


def curve_in_words(label: str, series: Series, form: Callable[[float], str] = decimals) -> str:
    """A curve in words, for people who do not see it."""
    finite = {round: value for round, value in sorted(series.items()) if math.isfinite(value)}
    if not finite:
        return f"{label}: no finite value"
    first, last = min(finite), max(finite)
    if first == last:
        return f"{label}: {form(finite[first])} at round {first}"
    return f"{label}: from {form(finite[first])} at round {first} to {form(finite[last])} at round {last}"


def flat_texts(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as texts by dotted key, which begins with ``prefix``."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat_texts(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = _plain(value)
    return found


def _bytes(value: float) -> str:
    return readable_bytes(value) if math.isfinite(value) else number(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(_plain(one) for one in value) or "none"
    return str(value)


_UNITS = ("B", "kB", "MB", "GB", "TB")


def readable_bytes(count: float) -> str:
    """Bytes with a decimal unit, three digits: ``4.58 MB``."""
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
