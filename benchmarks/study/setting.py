"""A setting of the study, read from its TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsmoothlora.config import flat
from fedsmoothlora.config.shipped import recipe_text
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments.grid import settings_to_try
from fedsmoothlora.experiments.variants import Variant, checked, from_tables

SETTINGS = Path(__file__).parent / "settings"
# In order of importance: the second study, then the first one.
ORDER = (
    "low-bit",
    "bytes-reuters",
    "bytes-fashion",
    "bytes-smollm2",
    "head-rates",
    "wider",
    "calibration-step",
    "unequal-ranks",
    "screen",
    "reuters",
    "reuters-short",
    "fashion",
    "bbc",
    "partial",
    "asdiv",
    "medmcqa",
    "remedies",
    "distance",
    "privacy",
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A recipe, its scenarios, and the variants that are compared in them.

    Attributes:
        name: the name of the file.
        about: one sentence.
        config: the name of a recipe.
        common: values for all runs, by dotted key.
        scenarios: further values by dotted key, by name of the scenario.
        variants: the variants; the first is the baseline.
        grid: the grid, as in `fedsmoothlora tune`.
        grids: the grids of scenarios that have their own.
        trials: the number of trials of every variant.
        tuning_seeds: by scenario, the number of runs of a trial; its score is their mean. 1 by default.
        seeds: the seeds of the comparison.
        metric: the metric that decides.
        ours: by scenario, the labels of FedSmoothLoRA that are compared with every baseline: first the
            paper's settings, last the ones that are thought best.
        baselines: the labels of the other methods; all other labels are ablations or options.
        only: by scenario, the labels that take part; all by default.
        pairs: labels that differ in one part, so that their difference shows its effect.
        not_counted: scenarios that the summary of the first study leaves out because they decide too little.
        equal_bytes: the setting belongs to the second study, which compares methods at equal bytes.
        tunes_on_test: trials are scored on the test set, with seeds that the comparison does not use. With
            ``[privacy]`` there are no validation rows that could leave the clients.
        notes: Markdown about the results, for the page of the setting.
        scenario_notes: the same by scenario.
        dropped_after: the commit that can run the setting if its variants need options that were not kept;
            empty otherwise.
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
    grids: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    equal_bytes: bool = False
    tunes_on_test: bool = False
    notes: str = ""
    scenario_notes: Mapping[str, str] = field(default_factory=dict)
    dropped_after: str = ""

    def overrides(self, scenario: str) -> dict[str, Any]:
        """Values for all runs of a scenario."""
        return {**self.common, **self.scenarios[scenario]}

    def trials_of(self, scenario: str) -> dict[str, list[dict[str, Any]]]:
        """The values that the trials of a scenario try, by label of the variant."""
        return settings_to_try(self.variants, self.grids.get(scenario, self.grid), self.trials, 0)

    def in_common(self, scenario: str) -> dict[str, Any]:
        """All that the records of a scenario share.

        The recipe with its values, the values that replace them, and how trials are scored.
        """
        return {
            "config": self.config,
            **_values_of(self.config),
            **self.overrides(scenario),
            "study.metric": self.metric,
            "study.tunes_on_test": self.tunes_on_test,
            "study.tuning_seeds": self.tuning_seeds.get(scenario, 1),
        }

    def is_partial(self, scenario: str) -> bool:
        """Whether only some of the clients take part in a round."""
        values = self.in_common(scenario)
        return any(key in values for key in ("participation.clients", "participation.fraction"))

    def variants_of(self, scenario: str) -> list[Variant]:
        """The variants that are compared in a scenario."""
        only = self.only.get(scenario)
        return [one for one in self.variants if only is None or one.label in only]


def _values_of(config: str | Mapping[str, Any]) -> dict[str, Any]:
    """The values that a recipe or a table sets, by dotted key, without its texts."""
    table = tomllib.loads(recipe_text(config)) if isinstance(config, str) else config
    return {key: value for key, value in flat(table).items() if key not in ("name", "description")}


def read_setting(name: str) -> Setting:
    """A setting by name. Raises ``ConfigError`` if it does not exist or is invalid."""
    file = SETTINGS / f"{name}.toml"
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"--setting {name}: there is no such setting; there are {', '.join(ORDER)}"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {error}") from None
    try:
        setting = _from_table(name, table, file)
    except KeyError as error:
        raise ConfigError(f"{file}: {error} is missing") from None
    _check(setting, file)
    return setting


def _from_table(name: str, table: Mapping[str, Any], file: Path) -> Setting:
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
        grids=table.get("grids", {}),
        equal_bytes=study.get("equal_bytes", False),
        tunes_on_test=study.get("tunes_on_test", False),
        notes=study.get("notes", "").strip(),
        scenario_notes={name: text.strip() for name, text in table.get("notes", {}).items()},
        dropped_after=study.get("dropped_after", ""),
    )


def _check(setting: Setting, file: Path) -> None:
    """Raise ``ConfigError`` for a scenario, a label or a seed that would be ignored."""
    by_scenario = {
        name: getattr(setting, name) for name in ("tuning_seeds", "ours", "only", "grids", "scenario_notes")
    }
    by_scenario["not_counted"] = setting.not_counted
    for name, scenarios in by_scenario.items():
        if unknown := set(scenarios) - set(setting.scenarios):
            raise ConfigError(
                f"{file}: {name} has {', '.join(sorted(unknown))}, but the scenarios are "
                f"{', '.join(setting.scenarios)}"
            )
    labels = [one.label for one in setting.variants]
    listed = [*setting.ours.values(), *setting.only.values(), *setting.pairs]
    if unlisted := {label for some in listed for label in some} - set(labels):
        raise ConfigError(
            f"{file}: ours, only or pairs have {', '.join(sorted(unlisted))}, but the variants are "
            f"{', '.join(labels)}"
        )
    for scenario, values in setting.scenarios.items():
        if "seed" in values:
            raise ConfigError(f"{file}: scenario.{scenario}.seed: set it in [all], for all scenarios")
