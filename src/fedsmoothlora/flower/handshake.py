"""The properties that coordinator and sites must share, compared before round 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from fedsmoothlora.errors import DisagreementError, WireError
from fedsmoothlora.printable import listed, printable

# Counts up to this one are exact as float64, in which weights are computed.
MOST_ROWS = 2**53


@dataclass(frozen=True, kw_only=True)
class SiteInfo:
    """The message of a site before round 0.

    Attributes:
        client: the site's client id.
        samples: number of training rows, from 1 to 2^53; 1 if they are private.
        validation: number of validation rows, up to 2^53.
        classes: the label map, the names of the classes in the order of their labels.
        weights: SHA-256 of the base weights.
        tokenizer: SHA-256 of the tokenizer's files; ``none`` if there are none.
        histogram: training rows of each class if the site shows them, otherwise empty.
    """

    client: str
    samples: int
    validation: int
    classes: Sequence[str]
    weights: str
    tokenizer: str
    histogram: Sequence[int] = ()

    def table(self) -> dict[str, Any]:
        """The fields as plain values and lists of them."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> SiteInfo:
        """Read the table that a site sent.

        Raises ``WireError`` for fields that are missing, unknown or of the wrong type, and for counts that
        no site can have.
        """
        hints = get_type_hints(cls)
        if table.keys() != hints.keys():
            raise WireError(
                f"its site info has the fields {listed(sorted(table), most=10)}; "
                f"they must be {', '.join(hints)}"
            )
        items = {Sequence[str]: str, Sequence[int]: int}
        for name, hint in hints.items():
            value = table[name]
            right = (
                type(value) is list and all(type(item) is items[hint] for item in value)
                if hint in items
                else type(value) is hint
            )
            if not right:
                raise WireError(f"its {name} is of type {type(value).__name__}")
        for name, least in (("samples", 1), ("validation", 0)):
            if not least <= table[name] <= MOST_ROWS:
                count = printable(str(table[name]))
                raise WireError(f"its {name} is {count}; it must be an integer from {least} to 2^53")
        histogram = table["histogram"]
        if histogram and (min(histogram) < 0 or sum(histogram) != table["samples"]):
            raise WireError(f"its histogram does not add up to its {table['samples']} training rows")
        values: dict[str, Any] = {n: tuple(v) if type(v) is list else v for n, v in table.items()}
        return cls(**values)

    def check(self, own: SiteInfo) -> None:
        """Raise ``DisagreementError`` if the site differs from the coordinator, whose info is ``own``."""
        for what, name in (
            ("label map", "classes"),
            ("tokenizer (SHA-256)", "tokenizer"),
            ("base weights (SHA-256)", "weights"),
        ):
            theirs, ours = getattr(self, name), getattr(own, name)
            if tuple(theirs) != tuple(ours):
                raise DisagreementError(
                    f"the {what} of {printable(self.client)} is {_shown(theirs)}, "
                    f"the coordinator's is {_shown(ours)}; nothing is trained before they are the same"
                )
        if self.histogram and len(self.histogram) != len(own.classes):
            raise DisagreementError(
                f"the histogram of {printable(self.client)} has {len(self.histogram)} classes, "
                f"the label map {len(own.classes)}"
            )


def _shown(value: str | Sequence[str]) -> str:
    return printable(value) if isinstance(value, str) else f"[{listed(value, most=20)}]"
