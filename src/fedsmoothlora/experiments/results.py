"""The results of a comparison, by variant and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, pstdev

from fedsmoothlora.config import Config
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.experiments.budget import Budget
from fedsmoothlora.experiments.intervals import Difference, Summary, paired_difference, summary
from fedsmoothlora.experiments.planned_runs import PlannedRun, State
from fedsmoothlora.experiments.tuning_record import TuningRecord, TuningStatus
from fedsmoothlora.federation.fairness import worst_tenth
from fedsmoothlora.federation.records import OWN
from fedsmoothlora.reports.metrics import larger_is_better
from fedsmoothlora.reports.reading import Metrics, Series, read_metrics

EXPLODED_LOSS = 10.0
"""A run's loss has exploded if it ends above this many times the loss before training."""


@dataclass(frozen=True)
class Cost:
    """The cost of a run up to some round: finished rounds, bytes up and down, seconds of the rounds."""

    rounds: float
    bytes: float
    seconds: float


@dataclass(frozen=True)
class ClientSpread:
    """How much the clients of a run differ at its end.

    Attributes:
        metric: the metric, with the prefix of the clients' own or personal models.
        clients: number of clients.
        worst, middle, best: the values of the worst, the median and the best client.
        std: the standard deviation over clients.
        mean: the mean over clients, each counted once.
        worst_tenth: the mean over the worst ``ceil(C / 10)`` of ``C`` clients.
    """

    metric: str
    clients: float
    worst: float
    middle: float
    best: float
    std: float
    mean: float
    worst_tenth: float


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The result of one run.

    Attributes:
        label: the label of the variant.
        seed: the seed of the run.
        state: the state of the planned run.
        reason: why it did not finish; empty if it did.
        folder: the run folder.
        config: the configuration of the run.
        metrics: the metrics of the run.
    """

    label: str
    seed: int
    state: State
    reason: str
    folder: Path
    config: Config
    metrics: Metrics

    def final(self, name: str) -> float | None:
        """A metric of the global model after the last round, also of a run that ended early.

        None if the run did not finish or has no finite value.
        """
        value = self.metrics.server.get(name, {}).get(self.metrics.rounds or 0, math.nan)
        return value if self.state == "finished" and math.isfinite(value) else None

    @property
    def loss_explosion(self) -> str:
        """A sentence about a loss that ended far above the loss before training; empty if it did not.

        Such a run has diverged in all but name: its values are still finite, but the model is lost.
        """
        losses = self.metrics.server.get("loss", {})
        before, after = losses.get(0, math.nan), losses.get(self.metrics.rounds or 0, math.nan)
        if self.state != "finished" or not has_exploded(before, after):
            return ""
        return f"the loss exploded: {after:.3g} after the last round, {before:.3g} before training"

    @cached_property
    def costs(self) -> dict[int, Cost]:
        """The cost up to each round."""
        server = self.metrics.server
        spent = Cost(0, 0, 0)
        found = {0: spent}
        for k in range(1, (self.metrics.rounds or 0) + 1):
            bytes = sum(server.get(name, {}).get(k, 0.0) for name in ("bytes_up", "bytes_down"))
            seconds = server.get("seconds_round", {}).get(k, 0.0)
            spent = Cost(k, spent.bytes + bytes, spent.seconds + seconds)
            found[k] = spent
        return found

    def bytes_per_client(self, name: str) -> float | None:
        """The mean bytes of one client in one round, over the finished rounds and the clients that took part.

        Args:
            name: ``bytes_up`` or ``bytes_down``.

        Returns:
            The mean; None if no round has finished.
        """
        server = self.metrics.server
        clients = sum(sum(server.get(taking_part, {}).values()) for taking_part in ("clients", "left_out"))
        return sum(server.get(name, {}).values()) / clients if clients else None

    def cost_to(self, name: str, target: float) -> Cost | None:
        """The cost up to the first round that is at least as good as ``target``.

        None if no round is, or if the run did not finish.
        """
        if self.state != "finished":
            return None
        sign = 1 if larger_is_better(name) else -1
        for round, value in sorted(self.metrics.server.get(name, {}).items()):
            if sign * value >= sign * target:
                return self.costs[round]
        return None

    def clients(self, metric: str) -> ClientSpread | None:
        """How much the clients differ at the end.

        The metric is ``metric`` on their validation rows, of the global model or of their own models if the
        method has no global model. Without validation rows it is their training loss.
        """
        name = metric if self.config.method.traits.global_model else f"{OWN}{metric}"
        return self.spread(name) if self.metrics.clients.get(name) else self.spread("train_loss")

    def spread(self, name: str) -> ClientSpread | None:
        """How much the clients differ at the end in one of their metrics; None if it was not measured."""
        by_client = self.metrics.clients.get(name, {})
        values = [series[max(series)] for series in by_client.values()]
        values = sorted(value for value in values if math.isfinite(value))
        if self.state != "finished" or not values:
            return None
        better = larger_is_better(name)
        worst, best = (values[0], values[-1]) if better else (values[-1], values[0])
        return ClientSpread(
            metric=name,
            clients=len(values),
            worst=worst,
            middle=median(values),
            best=best,
            std=pstdev(values),
            mean=fmean(values),
            worst_tenth=worst_tenth(values, larger_is_better=better),
        )


def has_exploded(before: float, after: float) -> bool:
    """Whether a loss ended far above the loss before training, or is not finite only at the end."""
    return math.isfinite(before) and not (math.isfinite(after) and after <= EXPLODED_LOSS * before)


@dataclass(frozen=True, kw_only=True)
class Results:
    """The results of all runs.

    Attributes:
        labels: the labels of the variants, in order.
        seeds: the seeds, in order.
        runs: results by label and seed.
        metric: the metric that decides.
        baseline: the label that others are compared with.
        target: the value of the metric whose cost is reported; None if the baseline has no value.
        target_given: whether the user chose the target.
        on_test: the metric is measured on a test set, rather than on the clients' validation rows.
        tuning: by label, whether the variant's settings were tuned.
        budget: the variants' ranks at equal bytes; None if they were not chosen.
    """

    labels: Sequence[str]
    seeds: Sequence[int]
    runs: Mapping[tuple[str, int], RunResult]
    metric: str
    baseline: str
    target: float | None
    target_given: bool
    on_test: bool
    tuning: Mapping[str, TuningStatus]
    budget: Budget | None = None

    @property
    def name(self) -> str:
        """The name of the configuration that all runs share."""
        run = self.of(self.labels[0])[0]
        return run.config.name.removesuffix(f": {run.label}, seed {run.seed}")

    @property
    def larger_is_better(self) -> bool:
        """Whether larger values of the metric are better."""
        return larger_is_better(self.metric)

    def of(self, label: str) -> list[RunResult]:
        """The runs of a variant, by seed."""
        return [self.runs[label, seed] for seed in self.seeds]

    def has_global_model(self, label: str) -> bool:
        """Whether there is a global model; otherwise the metrics are means over the clients' models."""
        return self.of(label)[0].config.method.traits.global_model

    def finals(self, label: str) -> dict[int, float]:
        """The metric after the last round by seed, for runs that have it."""
        found = {run.seed: run.final(self.metric) for run in self.of(label)}
        return {seed: value for seed, value in found.items() if value is not None}

    def final(self, label: str) -> Summary:
        """Mean and standard deviation of `finals`."""
        return summary(list(self.finals(label).values()))

    def difference(self, label: str) -> Difference:
        """The paired difference to the baseline, over the seeds that both have."""
        mine, theirs = self.finals(label), self.finals(self.baseline)
        both = [seed for seed in self.seeds if seed in mine and seed in theirs]
        return paired_difference([mine[seed] for seed in both], [theirs[seed] for seed in both])

    def record(self, label: str) -> TuningRecord | None:
        """How the settings of a variant were tuned; None if they count as untuned."""
        status = self.tuning.get(label)
        return status.record if status else None

    def verdict(self, label: str) -> str:
        """The verdict of the difference's interval; ``untuned`` in place of ``better`` or ``worse``.

        Both the variant and the baseline must have been tuned: with other settings, an untuned one could be
        on the other side.
        """
        difference = self.difference(label)
        verdict = difference.verdict(larger_is_better=self.larger_is_better, seeds=len(self.seeds))
        tuned = self.record(label) is not None and self.record(self.baseline) is not None
        return verdict if tuned or verdict not in ("better", "worse") else "untuned"

    def cost_to_target(self, label: str) -> tuple[Cost | None, int]:
        """The mean cost of the runs that reached the target, and their number."""
        if self.target is None:
            return None, 0
        found = [run.cost_to(self.metric, self.target) for run in self.of(label)]
        costs = [cost for cost in found if cost is not None]
        return mean_cost(costs), len(costs)

    def bytes_per_client(self, label: str, name: str) -> float | None:
        """``bytes_up`` or ``bytes_down`` of one client in one round, averaged over the runs."""
        found = [mean for run in self.of(label) if (mean := run.bytes_per_client(name)) is not None]
        return fmean(found) if found else None

    def cost(self, label: str) -> Cost | None:
        """The mean cost of the finished runs."""
        return mean_cost([run.costs[max(run.costs)] for run in self.of(label) if run.state == "finished"])

    def clients(self, label: str) -> ClientSpread | None:
        """The spread over clients, averaged over the seeds; None if it was not measured."""
        return _mean_spread([run.clients(self.metric) for run in self.of(label)])

    def personal(self, label: str, prefix: str) -> ClientSpread | None:
        """The spread over clients of their personal models, as `clients`.

        Args:
            label: the variant.
            prefix: ``personal_`` for the models of ``[personal]``, ``tuned_`` for the fine-tuned final model.
        """
        return _mean_spread([run.spread(f"{prefix}{self.metric}") for run in self.of(label)])

    def states(self, label: str) -> dict[str, int]:
        """The number of runs by state, for states that occur."""
        states = [run.state for run in self.of(label)]
        return {state: states.count(state) for state in dict.fromkeys(states)}

    def left_out(self, label: str) -> int:
        """The number of uploads that were left out over all runs, of diverged and of refused clients."""
        return int(sum(sum(run.metrics.server.get("left_out", {}).values()) for run in self.of(label)))

    def curves(self, label: str, name: str) -> list[Series]:
        """A metric of the global model or the server by round, one series for each run that has it."""
        return [series for run in self.of(label) if (series := run.metrics.server.get(name))]


def mean_cost(costs: Sequence[Cost]) -> Cost | None:
    """The mean of each part; None if there are no costs."""
    if not costs:
        return None
    return Cost(*(fmean(getattr(cost, part) for cost in costs) for part in ("rounds", "bytes", "seconds")))


def read_results(
    planned_runs: Mapping[tuple[str, int], PlannedRun],
    *,
    baseline: str | None = None,
    metric: str | None = None,
    target: float | None = None,
    on_test: bool = True,
    tuning: Mapping[str, TuningStatus] | None = None,
    budget: Budget | None = None,
) -> Results:
    """Read the run folders.

    Args:
        planned_runs: by label and seed.
        baseline, metric, target: as of `fedsmoothlora.experiments.compare.compare`.
        on_test: whether there is a test set.
        tuning: by label, whether the settings were tuned; variants that are missing count as untuned.
        budget: the variants' ranks at equal bytes; None if they were not chosen.

    Raises:
        ConfigError: no run has such a metric.
    """
    labels = list(dict.fromkeys(label for label, _ in planned_runs))
    states = {key: planned_run.state for key, planned_run in planned_runs.items()}
    runs = {
        (label, seed): RunResult(
            label=label,
            seed=seed,
            state=states[label, seed],
            # A run that finished after all may still have the reason of an earlier attempt.
            reason="" if states[label, seed] == "finished" else planned_run.outcome().get("reason", ""),
            folder=planned_run.folder,
            config=planned_run.config,
            metrics=read_metrics(planned_run.folder),
        )
        for (label, seed), planned_run in planned_runs.items()
    }
    decides = _metric(metric, list(runs.values()))
    results = Results(
        labels=labels,
        seeds=list(dict.fromkeys(seed for _, seed in planned_runs)),
        runs=runs,
        metric=decides,
        baseline=baseline or ("fedit" if "fedit" in labels else labels[0]),
        target=target,
        target_given=target is not None,
        on_test=on_test,
        tuning={label: status.compared_by(decides) for label, status in (tuning or {}).items()},
        budget=budget,
    )
    if target is not None:
        return results
    mean = results.final(results.baseline).mean
    return replace(results, target=mean if math.isfinite(mean) else None)


def _metric(wanted: str | None, runs: Sequence[RunResult]) -> str:
    # Metrics of the model are measured before training too, unlike those of the server.
    found = {name for run in runs for name, series in run.metrics.server.items() if 0 in series}
    measured = sorted(name for name in found if not name.startswith("seconds_"))
    if wanted is None:
        # A metric that decides about the best round, and is not one of most tasks, decides here too.
        best = [run.config.checkpoint.best for run in runs]
        chosen = [name for name in best if name not in ("accuracy", "loss")]
        main = (*chosen, "accuracy", *(run.config.task.metrics[0] for run in runs), "loss")
        return next((name for name in main if name in measured), "loss" if measured else "accuracy")
    if measured and wanted not in measured:
        raise ConfigError(f"--metric {wanted}: was not measured; there are {', '.join(measured)}")
    return wanted


def _mean_spread(found: Sequence[ClientSpread | None]) -> ClientSpread | None:
    """The mean of the spreads of several runs, without those that were not measured."""
    measured = [spread for spread in found if spread is not None]
    if not measured:
        return None
    means = {
        part.name: fmean(getattr(one, part.name) for one in measured)
        for part in fields(ClientSpread)
        if part.name != "metric"
    }
    return ClientSpread(metric=measured[0].metric, **means)
