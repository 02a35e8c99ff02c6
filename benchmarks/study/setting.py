"""A setting of the study, out of its TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsmoothlora.comparison.variants import Variant, checked, from_tables
from fedsmoothlora.config import ConfigError, flat

SETTINGS = Path(__file__).parent / "settings"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is compared on what.

    Attributes:
        name: of its file.
        about: one sentence.
        config: a recipe's name.
        common: values for all runs, by dotted key.
        scenarios: further values, by dotted key, by the scenario's name.
        variants: what is compared; the first is the baseline.
        grid: as of `fedsmoothlora tune`.
        trials: of every variant.
        seeds: of the comparison: 0, 1, ...
        metric: what decides.
        only: by scenario, the labels that have a place in it; all unless given.
    """

    name: str
    about: str
    config: str
    common: Mapping[str, Any]
    scenarios: Mapping[str, Mapping[str, Any]]
    variants: Sequence[Variant]
    grid: Mapping[str, Sequence[Any]]
    trials: int
    seeds: int
    metric: str
    only: Mapping[str, Sequence[str]]

    def overrides(self, scenario: str) -> dict[str, Any]:
        """Values for all runs of a scenario."""
        return {**self.common, **self.scenarios[scenario]}

    def variants_of(self, scenario: str) -> list[Variant]:
        """What is compared in a scenario."""
        only = self.only.get(scenario)
        return [one for one in self.variants if only is None or one.label in only]


def names() -> list[str]:
    """The settings there are."""
    return sorted(file.stem for file in SETTINGS.glob("*.toml"))


def read_setting(name: str) -> Setting:
    """A setting by name. Raises ``ConfigError`` if there is none, or it is not one."""
    file = SETTINGS / f"{name}.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--setting {name}: there is no such setting; there are {', '.join(names())}") from None
    study = table["study"]
    variants = checked(from_tables(table["variant"], str(file)))
    return Setting(
        name=name,
        about=study["about"],
        config=study["config"],
        common=flat(table.get("all", {})),
        scenarios={scenario: flat(values) for scenario, values in table["scenario"].items()},
        variants=variants,
        grid=table["grid"],
        trials=study["trials"],
        seeds=study["seeds"],
        metric=study.get("metric", "accuracy"),
        only=table.get("only", {}),
    )
