"""Texts of users as labels of a chart."""

from __future__ import annotations


def label_text(text: str, most: int = 16) -> str:
    """Someone else's text as matplotlib takes it: short, printable, and with no formula in it."""
    text = "".join(char if char.isprintable() else "\ufffd" for char in str(text))
    text = text if len(text) <= most else text[: most - 1] + "…"
    return text.replace("$", r"\$")
