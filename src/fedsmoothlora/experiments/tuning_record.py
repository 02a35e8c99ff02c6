"""How the settings of a variant were tuned: recorded by `tune`, read by `compare`."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tomli_w
from annotated_types import Ge
from pydantic import ValidationError

from fedsmoothlora.config import Config, first_difference, flat, to_toml
from fedsmoothlora.config.validation import problems, validate
from fedsmoothlora.errors import ConfigError

# Keys that tuning and comparison set differently by design. They do not change which settings are good.
_MAY_DIFFER = (
    *("name", "description", "seed", "data.validation", "evaluation", "checkpoint", "tracking", "machine"),
)


@dataclass(frozen=True, kw_only=True)
class TuningRecord:
    """How `tune` chose the settings of one variant.

    Attributes:
        trials: the number of settings that were tried.
        seeds: the seeds of each trial.
        metric: the metric that decided, on validation rows.
        score: its mean over the seeds for the chosen settings.
        grid: the values that were tried, by dotted key.
        at_edge: the keys whose chosen value is the smallest or the largest that was tried.
        config: the whole configuration of the chosen trial.
    """

    trials: Annotated[int, Ge(1)]
    seeds: tuple[int, ...]
    metric: str
    score: float
    grid: dict[str, list[Any]]
    at_edge: tuple[str, ...]
    config: dict[str, Any]

    @property
    def budget(self) -> str:
        """The number of trials and seeds, such as ``12 trials, 3 seeds each``."""
        return f"{_count(self.trials, 'trial')}, {_count(len(self.seeds), 'seed')} each"

    def table(self) -> dict[str, Any]:
        """The record as a TOML table."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


@dataclass(frozen=True)
class TuningStatus:
    """Whether the settings of a variant were tuned for this comparison.

    Attributes:
        record: how they were tuned; None if they count as untuned.
        reason: why they count as untuned; empty if they were tuned.
    """

    record: TuningRecord | None
    reason: str = ""

    def compared_by(self, metric: str) -> TuningStatus:
        """The status in a comparison by ``metric``: settings that were chosen by another one are untuned."""
        if self.record is None or self.record.metric == metric:
            return self
        return TuningStatus(None, f"tuned by {self.record.metric}, and compared by {metric}")


def parse_record(table: Any, origin: str) -> TuningRecord:
    """The ``[variant.tuning]`` table of a file; ``origin`` names the file and the variant in errors.

    Raises ``ConfigError`` if the table is no record of `tune`.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{origin}: tuning must be the table that `fedsmoothlora tune` writes")
    try:
        return validate(TuningRecord, table)
    except ValidationError as error:
        found = "; ".join(problems(error, TuningRecord, table, section="tuning"))
        raise ConfigError(f"{origin}: {found}") from None


def record_of(
    config: Config,
    tried: Sequence[Mapping[str, Any]],
    *,
    seeds: Sequence[int],
    metric: str,
    score: float,
    at_edge: Sequence[str],
) -> TuningRecord:
    """The record of a variant whose chosen trial has the configuration ``config``."""
    grid: dict[str, list[Any]] = {key: [] for key in tried[0]}
    for settings in tried:
        for key, value in settings.items():
            if value not in grid[key]:
                grid[key].append(value)
    return TuningRecord(
        trials=len(tried),
        seeds=tuple(seeds),
        metric=metric,
        score=score,
        grid=grid,
        at_edge=tuple(at_edge),
        config=tomllib.loads(to_toml(config)),
    )


def status_of(record: TuningRecord | None, config: Config) -> TuningStatus:
    """Whether a record holds for a variant that is compared with the configuration ``config``."""
    if record is None:
        return TuningStatus(None, "no tuning is recorded")
    if record.trials < 2:
        return TuningStatus(None, "tuning tried one setting only")
    now = to_toml(config)
    then = tomli_w.dumps(record.config)
    key = first_difference(now, then, ignoring=_MAY_DIFFER, before_planning=True)
    if key is None:
        return TuningStatus(record)
    here, there = (flat(table).get(key, "not set") for table in (tomllib.loads(now), record.config))
    return TuningStatus(None, f"{key} was {there} during tuning and is {here} here")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
