"""What coordinator and sites must have in common before round 0, and how a disagreement is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from fedsmoothlora.errors import DisagreementError, WireError


@dataclass(frozen=True, kw_only=True)
class SiteInfo:
    """What a site tells the coordinator once, before round 0.

    Attributes:
        client: its id.
        samples: number of its training rows.
        validation: number of its validation rows.
        classes: the label map: the classes' names, in the labels' order.
        weights: SHA-256 of the base weights.
        tokenizer: SHA-256 of the tokenizer's files; `NO_TOKENIZER` where there are none.
        histogram: rows of each class, where the site shows it; empty otherwise.
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
        """The info that a site sent. Raises ``WireError`` where its fields are not of the right types."""
        hints = get_type_hints(cls)
        if table.keys() != hints.keys():
            raise WireError(
                f"its site info has the fields {', '.join(sorted(table))}; they must be {', '.join(hints)}"
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
        if table["samples"] < 1 or table["validation"] < 0:
            raise WireError(f"it has {table['samples']} training and {table['validation']} validation rows")
        values: dict[str, Any] = {n: tuple(v) if type(v) is list else v for n, v in table.items()}
        return cls(**values)

    def check(self, own: SiteInfo) -> None:
        """Raise ``DisagreementError`` where this site info differs from the coordinator's ``own``."""
        for what, name in (
            ("label map", "classes"),
            ("tokenizer (SHA-256)", "tokenizer"),
            ("base weights (SHA-256)", "weights"),
        ):
            theirs, ours = getattr(self, name), getattr(own, name)
            if tuple(theirs) != tuple(ours):
                raise DisagreementError(
                    f"the {what} of {self.client} is {_shown(theirs)}, the coordinator's is {_shown(ours)}; "
                    "nothing is trained before they are the same"
                )


def _shown(value: object) -> str:
    return value if isinstance(value, str) else f"[{', '.join(value)}]"  # type: ignore[arg-type]
