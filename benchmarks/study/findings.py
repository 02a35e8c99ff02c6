"""The records of a scenario, and comparisons of its variants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from benchmarks.study.records import Record, Records
from benchmarks.study.setting import Setting
from fedsmoothlora.experiments.intervals import Difference, paired_difference, summary
from fedsmoothlora.experiments.results import has_exploded
from fedsmoothlora.reports.metrics import larger_is_better

VERDICTS = ("better", "no difference seen", "worse")
_SPENT = ("bytes_up", "bytes_down", "seconds_round")


class Findings:
    """The records of one scenario, and comparisons of its variants.

    Args:
        setting: the setting.
        scenario: its name.
        records: its records.
    """

    def __init__(self, setting: Setting, scenario: str, records: Records) -> None:
        self.setting, self.scenario = setting, scenario
        self.trials, self.runs = records.trials(), records.runs()
        self.paper = setting.ours[scenario][0]
        self.sign = 1 if larger_is_better(setting.metric) else -1
        wanted = [one.label for one in setting.variants_of(scenario)]
        # A variant is reported once all its seeds are finished, so that nobody chooses among seeds.
        self.labels = [label for label in wanted if all((label, seed) in self.runs for seed in setting.seeds)]
        self.left = [label for label in wanted if label not in self.labels]
        # All trials of these are recorded and none of them finished, so that there is nothing to compare.
        self.lost = [label for label in self.left if self._is_lost(label)]

    def _is_lost(self, label: str) -> bool:
        trials = self.trials_of(label)
        planned = self.setting.trials * self.setting.tuning_seeds.get(self.scenario, 1)
        return len(trials) == planned and best_trial(trials, self.setting.metric) is None

    def trials_of(self, label: str) -> list[Record]:
        """The recorded trials of a variant."""
        return [one for (variant, _, _), one in self.trials.items() if variant == label]

    def of(self, label: str) -> list[Record]:
        """Its runs by seed."""
        return [self.runs[label, seed] for seed in self.setting.seeds]

    def finals(self, label: str) -> list[float | None]:
        """The metric after the last round, by seed; None for a run that did not finish."""
        return [_final(run, self.setting.metric) for run in self.of(label)]

    def difference(self, label: str, other: str, of: Callable[[Record], float | None]) -> Difference:
        """The paired difference of a metric of the runs, over the seeds in which both have it."""
        both = self._pairs(label, other, of)
        return paired_difference([a for a, _ in both], [b for _, b in both])

    def final_pairs(self, label: str, other: str) -> list[tuple[float, float]]:
        """The final metrics of two variants, by seed; without seeds that only one of them finished."""
        return self._pairs(label, other, lambda run: _final(run, self.setting.metric))

    def final_difference(self, label: str, other: str) -> Difference:
        """The paired difference of the final metric."""
        return self.difference(label, other, lambda run: _final(run, self.setting.metric))

    def verdict(self, label: str, other: str) -> str:
        """The verdict of the interval of `final_difference`.

        ``not all seeds`` if a run of either did not finish: the other seeds alone would favour a method that
        diverges.
        """
        return self._verdict(self.final_difference(label, other), larger_is_better=self.sign > 0)

    def smoothness_verdict(self, label: str) -> str:
        """The verdict on the jump of the clients' loss, compared with FedIT."""
        return self._verdict(self.difference(label, "fedit", self.loss_jump), larger_is_better=False)

    def _verdict(self, difference: Difference, *, larger_is_better: bool) -> str:
        return difference.verdict(larger_is_better=larger_is_better, seeds=len(self.setting.seeds))

    def loss_jump(self, record: Record) -> float | None:
        """The clients' loss at the start of a round minus their loss at the end of their previous round.

        The mean over clients, and over the rounds after the first. Older records hold means over clients
        only; they give no jump where only some clients take part in a round.
        """
        if jumps := record["rounds"].get("loss_jump"):
            return _mean(jumps)
        return None if self.setting.is_partial(self.scenario) else _jump_of_means(record)

    def _pairs(
        self, label: str, other: str, of: Callable[[Record], float | None]
    ) -> list[tuple[float, float]]:
        pairs = [(of(a), of(b)) for a, b in zip(self.of(label), self.of(other), strict=True)]
        return [(a, b) for a, b in pairs if a is not None and b is not None]

    @property
    def name(self) -> str:
        """``SETTING: SCENARIO``."""
        return f"{self.setting.name}: {self.scenario}"

    @property
    def link(self) -> str:
        """The name, linked from docs/ to the page of the setting, and the metric unless it is accuracy."""
        metric = "" if self.setting.metric == "accuracy" else f" ({self.setting.metric})"
        return f"[{self.setting.name}](results/{self.setting.name}.md): {self.scenario}{metric}"

    @property
    def is_counted(self) -> bool:
        """Whether the summary of the first study includes this scenario."""
        return not self.setting.equal_bytes and self.scenario not in self.setting.not_counted

    def ours(self) -> list[str]:
        """The finished variants of FedSmoothLoRA that are compared with every baseline."""
        return [label for label in self.setting.ours[self.scenario] if label in self.labels]

    def baselines(self) -> list[str]:
        """The finished variants of other methods."""
        return [label for label in self.setting.baselines if label in self.labels]


def bytes_of(found: Findings, label: str, *, down: bool = True) -> float:
    """The mean bytes of a run, up and, with ``down``, down; NaN if no run finished."""
    spent = [
        sum(value or 0.0 for name in _SPENT[: 1 + down] for value in run["rounds"].get(name, ()))
        for run in found.of(label)
        if run["state"] == "finished"
    ]
    return summary(spent).mean


def best_trial(trials: Sequence[Record], metric: str) -> dict[str, Any] | None:
    """The settings with the best mean score over seeds, the first of equal ones; None if there is no score.

    A trial has no score if one of its runs did not finish.
    """
    sign = 1 if larger_is_better(metric) else -1
    scores: dict[int, list[float | None]] = {}
    settings = {one["trial"]: one["settings"] for one in trials}
    for one in trials:
        scores.setdefault(one["trial"], []).append(one["score"])
    means = {
        number: fmean(score for score in found if score is not None)
        for number, found in sorted(scores.items())
        if None not in found
    }
    return settings[max(means, key=lambda number: sign * means[number])] if means else None


def exploded(run: Record) -> bool:
    """Whether a run finished with a loss far above the loss before training, as in `fedsmoothlora tune`."""
    losses = run["rounds"].get("loss") or [None]
    before, after = (math.nan if one is None else one for one in (losses[0], losses[-1]))
    return run["state"] == "finished" and has_exploded(before, after)


def _jump_of_means(run: Record) -> float | None:
    """The mean over the rounds of the difference of two means over clients, which are the same clients."""
    starts, ends = (run["rounds"].get(name, []) for name in ("loss_at_start", "loss_at_end"))
    pairs = zip(starts[2:], ends[1:], strict=False)
    return _mean([start - end for start, end in pairs if start is not None and end is not None])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def cost_to_reach(
    found: Findings, label: str, targets: Sequence[float | None]
) -> tuple[tuple[float, float, float] | None, int]:
    """Mean rounds, bytes and seconds of the runs that reached the target of their seed, and how many did.

    A run that did not finish counts as one that did not reach it. A seed without a target is left out.
    """
    costs = []
    for run, target in zip(found.of(label), targets, strict=True):
        values = run["rounds"].get(found.setting.metric, []) if run["state"] == "finished" else []
        hits = (
            k
            for k, value in enumerate(values)
            if target is not None and value is not None and found.sign * value >= found.sign * target
        )
        if (k := next(hits, None)) is not None:
            # A round with client-level privacy has no bytes: they would tell how many clients were drawn.
            spent = [sum(x or 0.0 for x in run["rounds"].get(name, ())[: k + 1]) for name in _SPENT]
            costs.append((k, spent[0] + spent[1], spent[2]))
    if not costs:
        return None, 0
    rounds, sent, seconds = (fmean(part) for part in zip(*costs, strict=True))
    return (rounds, sent, seconds), len(costs)


def _final(run: Record, metric: str) -> float | None:
    values = run["rounds"].get(metric) or [None]
    return float(values[-1]) if run["state"] == "finished" and values[-1] is not None else None
