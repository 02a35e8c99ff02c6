"""What coordinator and sites must have in common before round 0, and how a disagreement is said."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from fedsmoothlora.errors import DisagreementError, WireError
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.models import model_files

# What decides how text becomes numbers, as transformers saves it.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)
NO_TOKENIZER = "none"


@dataclass(frozen=True, kw_only=True)
class Facts:
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
        """The facts as plain values and lists of these."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Facts:
        """The facts that a site sent. Raises ``WireError`` where they are not of the right types."""
        hints = get_type_hints(cls)
        if table.keys() != hints.keys():
            raise WireError(f"its facts are {', '.join(sorted(table))}; they must be {', '.join(hints)}")
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

    def check(self, own: Facts) -> None:
        """Raise ``DisagreementError`` where these facts are not the coordinator's ``own``."""
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


def tokenizer_hash(settings: ModelSettings) -> str:
    """SHA-256 of the names and contents of the model's tokenizer files; `NO_TOKENIZER` where it has none."""
    from transformers.utils import cached_file

    digest, found = hashlib.sha256(), False
    files = model_files(settings)
    source = files.pop("pretrained_model_name_or_path")
    for name in _TOKENIZER_FILES:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **files)
        if path is not None:
            data = Path(path).read_bytes()
            digest.update(f"{name}:{len(data)}:".encode() + data)
            found = True
    return digest.hexdigest() if found else NO_TOKENIZER


def _shown(value: object) -> str:
    return value if isinstance(value, str) else f"[{', '.join(value)}]"  # type: ignore[arg-type]
