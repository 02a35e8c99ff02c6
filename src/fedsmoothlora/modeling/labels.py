"""Match the classes of a checkpoint's trained head with those of the data."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

_MOST_NAMES = 10
_SEPARATORS = re.compile(r"[\s_-]+")


def order(own: Mapping[int, str], wanted: Sequence[str]) -> list[int] | None:
    """The row of a checkpoint's head for each of the wanted classes; None if the names do not agree.

    Names agree if they differ only in case or in spaces, hyphens and underscores. If two classes on one side
    differ only in these, names must be equal exactly.

    Args:
        own: the checkpoint's ``id2label``; transformers' default names (``LABEL_0``) name no class.
        wanted: names of the classes, in the order of their labels.
    """
    named = _names(own)
    if named is None or len(named) != len(wanted):
        return None
    for key in (_plain, str):
        rows = {key(name): row for row, name in enumerate(named)}
        keys = [key(name) for name in wanted]
        if len(rows) == len(set(keys)) == len(wanted):
            return [rows[name] for name in keys] if rows.keys() == set(keys) else None
    return None


def notes(own: Mapping[int, str], wanted: Sequence[str]) -> tuple[str, ...]:
    """Facts about a checkpoint's trained head and the wanted classes that users should know.

    Args:
        own, wanted: as in `order`.
    """
    rows = order(own, wanted)
    if rows == sorted(rows or [-1]):
        return ()
    named, classes = _names(own), _some(wanted)
    theirs = f"{len(own)} classes without names" if named is None else f"the classes {_some(named)}"
    head = f"the model's head is trained for {theirs}"
    if len(own) != len(wanted):
        return (f"{head}, and the data have {len(wanted)} ({classes}): a new head is drawn",)
    if rows is not None:
        return (f"{head}; its rows are put into the order of the data's classes: {classes}",)
    return (f"{head}; its rows are used for {classes}, in this order, which data.classes can change",)


def _names(own: Mapping[int, str]) -> list[str] | None:
    """The names of a head's rows; None if they are transformers' default names, or if some have no name."""
    if sorted(own) != list(range(len(own))):
        return None
    named = [str(own[row]) for row in range(len(own))]
    return None if named == [f"LABEL_{row}" for row in range(len(own))] else named


def _plain(name: str) -> str:
    return _SEPARATORS.sub(" ", unicodedata.normalize("NFKC", name)).strip().casefold()


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
