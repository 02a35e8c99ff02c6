"""Kinds of columns by their names and first values, to guess a task from."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from string import Formatter
from typing import Any

from fedsmoothlora.data.chats import is_chat
from fedsmoothlora.data.numbers import number_in

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
RECORDINGS = (".aif", ".aiff", ".flac", ".mp3", ".ogg", ".wav")

Columns = Mapping[str, Sequence[Any]]

_FLAGS = {"0", "1", "0.0", "1.0", "true", "false"}


def named(usual: Iterable[str], names: Iterable[str]) -> str | None:
    """The first column that has one of the usual names."""
    by_lower = {name.lower(): name for name in names}
    return next((by_lower[name] for name in usual if name in by_lower), None)


def distinct(values: Sequence[Any]) -> int:
    """The number of different values, as texts."""
    return len({str(value) for value in values})


def are_texts(values: Sequence[Any]) -> bool:
    """Whether all values are texts or missing, and some are texts."""
    return all(isinstance(value, str | None) for value in values) and any(values)


def are_images(values: Sequence[Any]) -> bool:
    """Whether these are paths or bytes of images; the image feature of ``datasets`` holds either."""
    if all(isinstance(value, bytes) or (isinstance(value, dict) and "bytes" in value) for value in values):
        return not are_recordings([value.get("path") for value in values if isinstance(value, dict)])
    return _are_paths(values, IMAGES)


def are_recordings(values: Sequence[Any]) -> bool:
    """Whether these are paths of recordings, or bytes with such paths, as the audio feature holds them."""
    paths = [value.get("path") if isinstance(value, dict) else value for value in values]
    return bool(paths) and _are_paths(paths, RECORDINGS)


def are_lists(values: Sequence[Any]) -> bool:
    """Whether all values are lists of texts or numbers; in text files, they are written as JSON or Python."""
    return all(list_in(value) is not None for value in values)


def are_decimals(values: Sequence[Any]) -> bool:
    """Whether all values are finite numbers, and some are not whole."""
    numbers = [number_in(str(value)) for value in values]
    return all(number is not None for number in numbers) and not all(
        number.is_integer() for number in numbers if number is not None
    )


def are_flags(values: Sequence[Any]) -> bool:
    """Whether all values are 0 or 1, or true or false."""
    return all(str(value).strip().lower() in _FLAGS for value in values)


def is_in_a_template(name: str) -> bool:
    """Whether a template such as ``{name}`` can name the column."""
    try:
        return list(Formatter().parse(f"{{{name}}}")) == [("", name, "", None)]
    except ValueError:
        return False


def list_in(value: Any) -> list[Any] | None:
    """The list of texts or numbers that a value is or holds; None if there is none."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            try:
                value = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return None
    is_list = isinstance(value, list) and all(isinstance(part, str | int | float) for part in value)
    return value if is_list else None


def _are_paths(values: Sequence[Any], suffixes: tuple[str, ...]) -> bool:
    return all(isinstance(value, str) and value.lower().endswith(suffixes) for value in values)


def are_chats(values: Sequence[Any]) -> bool:
    """Whether these are lists of messages, or the JSON text of such lists."""
    return all(is_chat(value if isinstance(value, str) else json.dumps(value)) for value in values)
