"""Numbers in texts."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def number_in(text: str) -> float | None:
    """The number that a text is, such as ``-2.5`` or ``1e3``; None if it is none, or not finite.

    Unlike ``float``, this refuses ``1_000`` and digits of other scripts, which a table hardly means as these
    numbers.
    """
    text = text.strip()
    value = float(text) if _NUMBER.fullmatch(text) else float("inf")
    return value if abs(value) < float("inf") else None
