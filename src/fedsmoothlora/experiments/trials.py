"""The trials of a tuning: their scores, and the best of each variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from fedsmoothlora.experiments.planned_runs import PlannedRun
from fedsmoothlora.experiments.results import RunResult, read_results
from fedsmoothlora.experiments.tuning_record import TuningRecord, record_of
from fedsmoothlora.reports.metrics import larger_is_better


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Settings of a variant that were tried.

    Attributes:
        variant: the label of the variant.
        number: from 1.
        overrides: the values that were tried, beside the variant's own settings.
        scores: the metric after the last round, by tuning seed, for states that are ``finished``.
        states: the state of each run, by tuning seed: that of its planned run, or ``exploded`` if it finished
            with a loss far above the loss before training, or with clients' own models that diverged.
        reasons: why a run has no score, by tuning seed.
    """

    variant: str
    number: int
    overrides: Mapping[str, Any]
    scores: Mapping[int, float]
    states: Mapping[int, str]
    reasons: Mapping[int, str]

    @property
    def score(self) -> float | None:
        """The mean score; None if a run did not finish or its loss exploded, which rules the trial out."""
        return fmean(self.scores.values()) if len(self.scores) == len(self.states) else None

    @property
    def is_left(self) -> bool:
        """Whether a run failed or was interrupted, so that the same command tries it again."""
        return any(state in ("failed", "waiting") for state in self.states.values())


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """All trials and the chosen settings.

    Attributes:
        folder: the folder of the tuning.
        metric: the metric that decides, on the clients' validation rows.
        trials: all trials, in order.
        chosen: the best trial by label; a variant is missing if no trial has a score, or if a run failed or
            was interrupted.
        records: by label, how the chosen settings were tuned; for the same labels as ``chosen``.
        failed: why runs failed, by name of the run.
    """

    folder: Path
    metric: str
    trials: Sequence[Trial]
    chosen: Mapping[str, Trial]
    records: Mapping[str, TuningRecord]
    failed: Mapping[str, str]

    @property
    def at_edge(self) -> dict[str, list[str]]:
        """By label, the keys whose chosen value is the smallest or the largest that was tried."""
        return {label: list(record.at_edge) for label, record in self.records.items()}


def read_trials(
    settings: Mapping[str, Sequence[Mapping[str, Any]]],
    planned_runs: Mapping[tuple[str, int], PlannedRun],
    out: Path,
    metric: str | None,
) -> Tuned:
    """Score every trial, and choose the best of each variant; the first of equal ones."""
    results = read_results(planned_runs, metric=metric, on_test=False)
    trials = [
        _trial(variant, number, overrides, results.of(trial_name(variant, number)), results.metric)
        for variant, tried in settings.items()
        for number, overrides in enumerate(tried, start=1)
    ]
    sign = 1 if larger_is_better(results.metric) else -1
    chosen: dict[str, Trial] = {}
    records: dict[str, TuningRecord] = {}
    for variant, tried in settings.items():
        own = [trial for trial in trials if trial.variant == variant]
        ranked = [(trial, score) for trial in own if (score := trial.score) is not None]
        # Without the result of a value, the choice would depend on the failure.
        if not ranked or any(trial.is_left for trial in own):
            continue
        best, score = max(ranked, key=lambda one: sign * one[1])
        chosen[variant] = best
        records[variant] = record_of(
            results.of(trial_name(variant, best.number))[0].config,
            tried,
            seeds=results.seeds,
            metric=results.metric,
            score=score,
            at_edge=_at_edge(best, tried),
        )
    return Tuned(
        folder=out,
        metric=results.metric,
        trials=trials,
        chosen=chosen,
        records=records,
        failed={
            planned_run.name: planned_run.outcome()["reason"]
            for planned_run in planned_runs.values()
            if planned_run.state == "failed"
        },
    )


def trial_name(variant: str, number: int) -> str:
    """The label of a trial's runs, and its folder: ``LABEL/trial-01``."""
    return f"{variant}/trial-{number:02d}"


def _trial(
    variant: str, number: int, overrides: Mapping[str, Any], runs: Sequence[RunResult], metric: str
) -> Trial:
    exploded = {run.seed: reason for run in runs if (reason := run.loss_explosion or _clients_left_out(run))}
    finals = {run.seed: run.final(metric) for run in runs if run.seed not in exploded}
    return Trial(
        variant=variant,
        number=number,
        overrides=overrides,
        scores={seed: value for seed, value in finals.items() if value is not None},
        states={run.seed: "exploded" if run.seed in exploded else run.state for run in runs},
        reasons={run.seed: run.reason for run in runs if run.reason} | exploded,
    )


def _clients_left_out(run: RunResult) -> str:
    """A sentence about clients whose own models diverged in the last round; empty if there are none.

    Without a global model, the metric is the mean over the other clients, which says nothing about these.
    """
    count = run.metrics.server.get("left_out", {}).get(run.metrics.rounds or 0, 0)
    if run.state != "finished" or run.config.method.traits.global_model or not count:
        return ""
    return f"the uploads of {count:.0f} of the clients could not be used in the last round"


def _at_edge(chosen: Trial, tried: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose chosen number is the smallest or the largest of several that were tried."""
    found = []
    for key, value in chosen.overrides.items():
        values = {trial[key] for trial in tried if isinstance(trial[key], int | float)}
        if len(values) > 1 and not isinstance(value, bool) and value in (min(values), max(values)):
            found.append(key)
    return found
