"""The settings that `tune` tries: the same number for every variant, from a grid of values by key."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedsmoothlora import methods as all_methods
from fedsmoothlora.algebra.seeds import seed_for
from fedsmoothlora.config import Unset, parse_override
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments.variants import Variant

# Values by key for one variant.
Grid = dict[str, list[Any]]


def parse_grid(text: str) -> tuple[str, list[Any]]:
    """``training.lr=0.001,0.003`` or ``fedit:training.lr=...`` as key and values.

    Raises ``ConfigError`` for any other text.
    """
    key, sign, values = text.partition("=")
    if not sign or not key.strip() or not values.strip():
        raise ConfigError(f"--grid {text!r}: write KEY=VALUE,VALUE,..., for instance training.lr=0.001,0.003")
    found = [parse_override(f"{key}={value.strip()}")[1] for value in values.split(",")]
    if any(isinstance(value, Unset) for value in found):
        raise ConfigError(f"--grid {text!r}: a value is missing; write KEY=VALUE,VALUE,...")
    return key.strip(), found


def parse_grids(texts: Sequence[str]) -> Grid:
    """`parse_grid` of several texts. Raises ``ConfigError`` for a key that is given twice."""
    found: Grid = {}
    for key, values in map(parse_grid, texts):
        if key in found:
            raise ConfigError(
                f"--grid {key} is given twice: write all of its values at once, KEY=VALUE,VALUE,..."
            )
        found[key] = values
    return found


def settings_to_try(
    variants: Sequence[Variant], grid: Mapping[str, Sequence[Any]], trials: int | None, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """The overrides of each variant's trials by label, beside those that the variant sets itself.

    All variants have the same number of trials: the whole grid, or a subset that is drawn by seed.
    """
    grids = {one.label: grid_of(one, grid, {other.label for other in variants}) for one in variants}
    points = {name: _points(one) for name, one in grids.items()}
    count = min(map(len, points.values())) if trials is None else trials
    if count < 1:
        raise ConfigError(f"--trials {count}: must be at least 1")
    for name, found in points.items():
        if len(found) < count:
            raise ConfigError(
                f"--trials {count}: the grid of {name} has {len(found)} points, and all variants get the "
                f"same number of trials: add values (--grid {name}:training.lr=...), or lower --trials"
            )
    return {name: _drawn(found, count, seed, name) for name, found in points.items()}


def grid_of(variant: Variant, grid: Mapping[str, Sequence[Any]], labels: Collection[str] = ()) -> Grid:
    """The keys and values that a variant is tuned over, without the keys that it sets itself.

    ``METHOD:KEY`` replaces ``KEY`` for the variants of a method; ``LABEL:KEY`` replaces both for one variant.

    Args:
        variant: the variant.
        grid: values by key.
        labels: the labels of all variants.

    Raises ``ConfigError`` for a key that no method has, or that may not be tuned.
    """
    found: Grid = {}
    method = variant.method

    def precedence(key: str) -> int:
        whose, colon, _ = key.rpartition(":")
        return 0 if not colon else 1 if whose in all_methods.names() else 2

    for key, values in sorted(grid.items(), key=lambda item: precedence(item[0])):
        whose, colon, plain = key.rpartition(":")
        if colon and whose not in all_methods.names() and whose not in labels:
            raise ConfigError(f"--grid {key}: {whose!r} is neither a method nor the label of a variant")
        section, _, option = plain.partition(".")
        if section == "method" and not any(_has(name, option) for name in all_methods.names()):
            raise ConfigError(f"--grid {key}: no method has the key {plain}")
        if section == "method" and whose in all_methods.names() and not _has(whose, option):
            raise ConfigError(f"--grid {key}: {whose} has no such key")
        if not values or len(set(map(repr, values))) < len(values):
            raise ConfigError(f"--grid {key}: give at least one value, and no value twice")
        Variant("grid", {plain: values[0]}).check()
        applies = whose in ("", method, variant.label) and plain not in variant.overrides
        if applies and (section != "method" or _has(method, option)):
            found[plain] = list(values)
    if not found:
        raise ConfigError(f"--grid: no key applies to {variant.label}")
    return found


def _has(method: str, option: str) -> bool:
    return option in all_methods.find(method).option_names()


def _points(grid: Grid) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _drawn(points: Sequence[dict[str, Any]], count: int, seed: int, method: str) -> list[dict[str, Any]]:
    """All points in their order, or ``count`` of them."""
    chosen = random.Random(seed_for(seed, "trials", method)).sample(range(len(points)), count)
    return [points[index] for index in sorted(chosen)]
