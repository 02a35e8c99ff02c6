"""The variants of a comparison: methods with their own settings; everything else is shared."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedsmoothlora import methods
from fedsmoothlora.config import Unset, flat, parse_override
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments.tuning_record import TuningRecord, parse_record

# Data, initial model, budget and evaluation must be the same for all variants.
_SHARED = (
    *("name", "description", "seed", "model", "task", "data", "partition", "participation", "evaluation"),
    *("checkpoint", "tracking", "machine"),
    *("training.rounds", "training.epochs", "training.steps", "training.batch_size"),
)
_LABEL = re.compile(r"[\w.+=-]+", re.ASCII)


@dataclass(frozen=True)
class Variant:
    """A method with its settings.

    Attributes:
        label: the name in tables, and of the folder.
        overrides: the values that the variant sets, by dotted key, including ``method.name``.
        tuning: how these values were tuned; None if `tune` did not write them.
    """

    label: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tuning: TuningRecord | None = None

    @property
    def method(self) -> str:
        """The name of the method."""
        return str(self.overrides["method.name"])

    def check(self) -> None:
        """Raise ``ConfigError`` for a label that cannot name a folder, or a key that all must share."""
        if not _LABEL.fullmatch(self.label) or not self.label.strip("."):
            raise ConfigError(
                f"variant {self.label!r}: a label names a folder: letters, digits, and . _ + = - only"
            )
        for key in self.overrides:
            shared = next((name for name in _SHARED if key == name or key.startswith(f"{name}.")), None)
            if shared is not None:
                raise ConfigError(
                    f"variant {self.label!r} sets {key}, which must be the same for all variants; set it for "
                    "all of them (--set)"
                )


def collect(given: Sequence[str | Path | Variant]) -> list[Variant]:
    """Collect variants in order.

    Args:
        given: each is a method's name, ``LABEL: METHOD KEY=VALUE ...``, a TOML file (``.toml``) of variants
            such as `fedsmoothlora tune` writes, or a `Variant`.

    Raises:
        ConfigError: there is no variant, two have the same label, or one of them is invalid.
    """
    found: list[Variant] = []
    for one in given:
        if isinstance(one, Variant):
            found.append(one)
        elif isinstance(one, Path) or one.endswith(".toml"):
            found += read_variants(one)
        else:
            found.append(parsed(one) if ":" in one else named(one))
    if not found:
        raise ConfigError("nothing to compare: name methods (--methods) or variants (--variant)")
    return checked(found)


def checked(variants: Sequence[Variant]) -> list[Variant]:
    """The variants, if all are valid and their labels differ; ``ConfigError`` otherwise."""
    for variant in variants:
        variant.check()
    # Some file systems ignore case.
    twice = [label for label, n in Counter(v.label.lower() for v in variants).items() if n > 1]
    if twice:
        raise ConfigError(f"two variants are called {twice[0]!r}: give each its own label")
    return list(variants)


def named(name: str) -> Variant:
    """A method with the configuration's settings."""
    try:
        methods.find(name)
    except ValueError as error:
        raise ConfigError(f"--methods: {error}") from None
    return Variant(name, {"method.name": name})


def parsed(text: str) -> Variant:
    """``LABEL: METHOD KEY=VALUE ...``, such as ``zeta0: fedsmoothlora method.zeta=0 training.lr=0.01``."""
    label, colon, rest = text.partition(":")
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise ConfigError(f"--variant {text!r}: {error}") from None
    if not colon or not words or "=" in words[0]:
        raise ConfigError(
            f"--variant {text!r}: write LABEL: METHOD KEY=VALUE ..., for instance "
            "'zeta0: fedsmoothlora method.zeta=0'"
        )
    method, *settings = words
    found = dict(map(parse_override, settings))
    if unset := [key for key, value in found.items() if isinstance(value, Unset)]:
        raise ConfigError(
            f"--variant {text!r}: {unset[0]} has no value; to remove a key of the configuration for all "
            f"runs, use --set {unset[0]}="
        )
    return Variant(label.strip(), {**named(method).overrides, **found})


def read_variants(file: str | Path) -> list[Variant]:
    """Variants of a TOML file: ``[[variant]]`` tables, each a piece of configuration with a ``label``.

    .. code-block:: toml

        [[variant]]
        label = "zeta0"               # the method's name unless given
        method.name = "fedsmoothlora"
        method.zeta = 0.0
        training.lr = 0.003

    Raises ``ConfigError`` that names the file.
    """
    try:
        table = tomllib.loads(Path(file).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as TOML: {error}") from None
    return from_tables(table.get("variant"), str(file))


def from_tables(tables: Any, origin: str) -> list[Variant]:
    """``[[variant]]`` tables as variants; a ``ConfigError`` names ``origin``."""
    if not isinstance(tables, list) or not tables or not all(isinstance(one, dict) for one in tables):
        raise ConfigError(f"{origin}: has no [[variant]] table; each is a piece of configuration")
    found = []
    for number, table in enumerate(tables, start=1):
        overrides = flat({key: value for key, value in table.items() if key != "tuning"})
        label = overrides.pop("label", overrides.get("method.name"))
        name = overrides.get("method.name")
        if not isinstance(name, str) or not isinstance(label, str):
            raise ConfigError(f"{origin}: [[variant]] number {number} needs method.name, and label is text")
        try:
            methods.find(name)
        except ValueError as error:
            raise ConfigError(f"{origin}: [[variant]] {label!r}: method.name: {error}") from None
        tuning = table.get("tuning")
        record = None if tuning is None else parse_record(tuning, f"{origin}: [[variant]] {label!r}")
        found.append(Variant(label, overrides, record))
    return found


def to_tables(variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """The opposite of `from_tables`."""
    return [
        {
            "label": variant.label,
            **_nested(variant.overrides),
            **({"tuning": variant.tuning.table()} if variant.tuning is not None else {}),
        }
        for variant in variants
    ]


def to_toml(variants: Sequence[Variant]) -> str:
    """Variants as a TOML file that `read_variants` takes."""
    return tomli_w.dumps({"variant": to_tables(variants)})


def _nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in overrides.items():
        *sections, last = key.split(".")
        inner = table
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = list(value) if isinstance(value, tuple) else value
    return table
