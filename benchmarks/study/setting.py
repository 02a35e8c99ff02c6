"""A setting of the study, out of its TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsmoothlora.config import flat
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments.variants import Variant, checked, from_tables

SETTINGS = Path(__file__).parent / "settings"
# In order of importance.
ORDER = ("screen", "reuters", "reuters-short", "fashion", "bbc", "partial", "asdiv", "medmcqa", "remedies")


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
        tuning_seeds: by scenario, the runs of a trial, whose mean is its score; 1 unless given.
        seeds: of the comparison.
        metric: what decides.
        ours: by scenario, the labels of FedSmoothLoRA that are held against every baseline: first the
            paper's, then the one that is thought best.
        baselines: labels of the other methods; what is neither is an ablation or an option.
        only: by scenario, the labels that have a place in it; all unless given.
        pairs: labels that differ in one part, which is what their difference shows where both were run.
        not_counted: scenarios that the balance over all leaves out, since they decide too little.
        dropped_after: the commit that can run it, where its variants need options that were not kept; empty
            otherwise.
    """

    name: str
    about: str
    config: str
    common: Mapping[str, Any]
    scenarios: Mapping[str, Mapping[str, Any]]
    variants: Sequence[Variant]
    grid: Mapping[str, Sequence[Any]]
    trials: int
    tuning_seeds: Mapping[str, int]
    seeds: Sequence[int]
    metric: str
    ours: Mapping[str, Sequence[str]]
    baselines: Sequence[str]
    only: Mapping[str, Sequence[str]]
    pairs: Sequence[Sequence[str]]
    not_counted: Sequence[str]
    dropped_after: str = ""

    def overrides(self, scenario: str) -> dict[str, Any]:
        """Values for all runs of a scenario."""
        return {**self.common, **self.scenarios[scenario]}

    def in_common(self, scenario: str) -> dict[str, Any]:
        """What all runs of a scenario have in common: its configuration, and the values above."""
        return {"config": self.config, **self.overrides(scenario)}

    def variants_of(self, scenario: str) -> list[Variant]:
        """What is compared in a scenario."""
        only = self.only.get(scenario)
        return [one for one in self.variants if only is None or one.label in only]


def read_setting(name: str) -> Setting:
    """A setting by name. Raises ``ConfigError`` if there is none, or it is not one."""
    file = SETTINGS / f"{name}.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"--setting {name}: there is no such setting; there are {', '.join(ORDER)}"
        ) from None
    study = table["study"]
    variants = checked(from_tables(table["variant"], str(file)))
    common = flat(table.get("all", {}))
    return Setting(
        name=name,
        about=study["about"],
        config=study["config"],
        common=common,
        scenarios={scenario: flat(values) for scenario, values in table["scenario"].items()},
        variants=variants,
        grid=table["grid"],
        trials=study["trials"],
        tuning_seeds=table.get("tuning_seeds", {}),
        seeds=range(common.get("seed", 0), common.get("seed", 0) + study["seeds"]),
        metric=study.get("metric", "accuracy"),
        ours=table["ours"],
        baselines=[one.label for one in variants if one.method != "fedsmoothlora"],
        only=table.get("only", {}),
        pairs=study.get("pairs", ()),
        not_counted=study.get("not_counted", ()),
        dropped_after=study.get("dropped_after", ""),
    )
