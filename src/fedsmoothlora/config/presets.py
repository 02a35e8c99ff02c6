"""`method.preset`: a named setting that fills in keys of ``[method]`` and ``[transport]``."""

from __future__ import annotations

from typing import Any

from fedsmoothlora import methods
from fedsmoothlora.errors import MethodError


def fill_in_preset(table: dict[str, Any]) -> None:
    """Fill in the keys of the preset that ``[method]`` names; a key that is set stays as it is.

    A method or a preset that does not exist is refused where the section is checked.

    Args:
        table: a configuration's table; it is changed.
    """
    section = table.get("method")
    if not isinstance(section, dict) or "preset" not in section:
        return
    try:
        presets = methods.find(str(section.get("name"))).presets
    except MethodError:
        return
    for dotted, value in presets.get(str(section["preset"]), {}).items():
        name, _, key = dotted.partition(".")
        part = table.setdefault(name, {})
        if isinstance(part, dict):
            part.setdefault(key, value)
