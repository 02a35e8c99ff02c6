"""Numbers and settings of a report as text."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count, takewhile
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
    """The first and the last finite value of a curve, in words."""
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


def printable(text: str) -> str:
    """The text with escapes such as ``\\n`` and ``\\u202e`` in place of control characters.

    Characters that turn the direction of writing are among them, since they change how the text around
    them is read.
    """
    return "".join(_escape(char) if _is_control(char) else char for char in text)


def shortened(text: str, most: int) -> str:
    """The text with an ellipsis in its middle if it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def distinct(texts: Sequence[str], most: int) -> list[str]:
    """Printable texts of at most ``most`` characters, no two of them equal.

    Texts that are equal when shortened are shown without their common beginning and end; where that does not
    tell them apart in ``most`` characters, they get numbers behind them.
    """
    whole = [printable(text) for text in texts]
    found = [shortened(text, most) for text in whole]
    for equal in [text for text, times in Counter(found).items() if times > 1]:
        places = [place for place, text in enumerate(found) if text == equal]
        parts = _different_parts([whole[place] for place in places], most)
        if parts and not set(parts) & set(found):
            for place, part in zip(places, parts, strict=True):
                found[place] = part
    counts = Counter(found)
    taken = set(found)
    for place, text in enumerate(found):
        if counts[text] > 1:
            found[place] = _numbered(whole[place], most, taken)
            taken.add(found[place])
    return found


def _different_parts(texts: Sequence[str], most: int) -> list[str]:
    """The texts with an ellipsis for their common beginning and end; none if they are still equal or long."""
    start = _alike(texts)
    end = _alike([text[start:][::-1] for text in texts])
    parts = [("…" if start else "") + text[start : len(text) - end] + ("…" if end else "") for text in texts]
    return parts if len(set(parts)) == len(parts) and all(len(part) <= most for part in parts) else []


def _alike(texts: Sequence[str]) -> int:
    """The number of characters with which all texts begin."""
    return len(list(takewhile(lambda characters: len(set(characters)) == 1, zip(*texts, strict=False))))


def _numbered(text: str, most: int, taken: set[str]) -> str:
    """The shortened text with the first number behind it that makes it a new one."""
    endings = (f" ({number})" for number in count(1))
    return next(
        one for ending in endings if (one := shortened(text, most - len(ending)) + ending) not in taken
    )


def _is_control(char: str) -> bool:
    return (
        unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(char) in _CHANGES_OF_DIRECTION
        or ord(char) & 0xFFFE == 0xFFFE  # no character, and not allowed in XML
    )


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


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


_CHANGES_OF_DIRECTION = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
_UNITS = ("B", "kB", "MB", "GB", "TB")


def readable_bytes(count: float) -> str:
    """Bytes with a decimal unit, three digits: ``4.58 MB``."""
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
