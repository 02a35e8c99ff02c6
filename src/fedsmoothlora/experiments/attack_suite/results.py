"""The results of an attack suite, by attack, defence and seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean

import torch

from fedsmoothlora.algebra.lowrank import LowRank
from fedsmoothlora.errors import FedSmoothLoRAError
from fedsmoothlora.experiments.attack_suite.defences import MEAN
from fedsmoothlora.experiments.attack_suite.threat import success_metric
from fedsmoothlora.experiments.attacks import Attack, DataAttack
from fedsmoothlora.experiments.intervals import Difference, Summary
from fedsmoothlora.experiments.planned_runs import PlannedRun
from fedsmoothlora.experiments.results import Results, RunResult, read_results
from fedsmoothlora.exports.trained import global_model
from fedsmoothlora.federation.assembly import build_server, initial_state
from fedsmoothlora.methods import Layer
from fedsmoothlora.runs.planning import Plan
from fedsmoothlora.storage.checkpoints import Checkpoints
from fedsmoothlora.storage.restoring import restore_server
from fedsmoothlora.storage.run_folder import RunFolder

NONE = "none"
"""The label of the attack-free runs."""

MARGIN = 0.01
"""A defence holds if its final metric is worse than the attack-free mean's by no more than this."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An attack and a defence.

    Attributes:
        attack: the attack; None for the attack-free run.
        defence: the name of the defence.
    """

    attack: Attack | None
    defence: str

    @property
    def attack_label(self) -> str:
        """The label of the attack."""
        return NONE if self.attack is None else self.attack.label

    @property
    def label(self) -> str:
        """The name of the pair in files and folders."""
        return f"{self.attack_label}+{self.defence}"


BASELINE = Pair(attack=None, defence=MEAN).label
"""The label of the runs that others are compared with: no attack, and the plain mean."""


@dataclass(frozen=True, kw_only=True)
class AttackResults:
    """The results of all runs.

    Attributes:
        runs: the runs as the results of a comparison whose variants are the pairs.
        pairs: attack and defence by label, in order.
        refused: why a pair was not run, by label.
        malicious: the malicious clients of the first seed's partition.
        clients: the number of all clients.
        norms: by label and seed, the norm of the sum of all server updates; no entry if it is not known.
    """

    runs: Results
    pairs: Mapping[str, Pair]
    refused: Mapping[str, str]
    malicious: Sequence[str]
    clients: int
    norms: Mapping[tuple[str, int], float] = field(default_factory=dict)

    @cached_property
    def attacks(self) -> list[str]:
        """Labels of the attacks in order, without the attack-free runs."""
        return [
            label for label in dict.fromkeys(p.attack_label for p in self.pairs.values()) if label != NONE
        ]

    def of_attack(self, attack: str) -> list[str]:
        """The labels of the pairs with an attack, also of those that were refused."""
        return [label for label, pair in self.pairs.items() if pair.attack_label == attack]

    def final(self, label: str) -> Summary:
        """Mean and standard deviation of the final metric."""
        return self.runs.final(label)

    def difference(self, label: str) -> Difference:
        """The paired difference of the final metric to the attack-free mean."""
        return self.runs.difference(label)

    def success(self, label: str) -> float | None:
        """The success of the attack, averaged over the seeds."""
        attack = self.pairs[label].attack
        return self._mean_success(label, attack) if isinstance(attack, DataAttack) else None

    def success_without(self, label: str) -> float | None:
        """The same share of rows in the attack-free run with the plain mean."""
        attack = self.pairs[label].attack
        return self._mean_success(BASELINE, attack) if isinstance(attack, DataAttack) else None

    def movement(self, label: str) -> float | None:
        """The norm of the sum of all server updates, relative to the attack-free mean; a mean over seeds."""
        ratios = [
            self.norms[label, seed] / honest
            for seed in self.runs.seeds
            if (label, seed) in self.norms and (honest := self.norms.get((BASELINE, seed), 0.0))
        ]
        return fmean(ratios) if ratios else None

    def refusals(self, label: str) -> int:
        """The number of uploads that the server refused, over all runs."""
        return int(sum(sum(run.metrics.server.get("refused", {}).values()) for run in self.runs.of(label)))

    def loss_of(self, label: str) -> float:
        """By how much the final metric is worse than the attack-free mean's; NaN if it is not known."""
        mean = self.difference(label).mean
        return -mean if self.runs.larger_is_better else mean

    def unfinished(self, label: str) -> int:
        """The number of seeds whose run has no final metric: it diverged, failed, or was not run."""
        return len(self.runs.seeds) - self.difference(label).n

    def best(self, attack: str) -> str | None:
        """The pair with the best final metric under an attack; None if no run has finished.

        A pair whose runs finished with more seeds comes first: an attack that ends a run has succeeded.
        """
        losses = {
            label: (self.unfinished(label), loss)
            for label in self.of_attack(attack)
            if label not in self.refused and not math.isnan(loss := self.loss_of(label))
        }
        return min(losses, key=lambda label: losses[label]) if losses else None

    def withstood(self, attack: str) -> bool:
        """Whether the best defence finished with every seed, within `MARGIN` of the attack-free mean."""
        best = self.best(attack)
        return best is not None and not self.unfinished(best) and self.loss_of(best) <= MARGIN

    def _mean_success(self, label: str, attack: Attack) -> float | None:
        name = success_metric(attack)
        found = [value for run in self.runs.of(label) if (value := run.final(name)) is not None]
        return fmean(found) if found else None


def read_attack_results(
    planned_runs: Mapping[tuple[str, int], PlannedRun],
    pairs: Mapping[str, Pair],
    refused: Mapping[str, str],
    *,
    planned: Plan,
    malicious: int,
    metric: str | None = None,
) -> AttackResults:
    """Read the run folders.

    Args:
        planned_runs: by label and seed.
        pairs, refused: as in `AttackResults`.
        planned: the plan of the first run; all runs have its layers.
        malicious: the number of malicious clients.
        metric: as of `fedsmoothlora.experiments.attack_suite.suite.attack`.

    Raises:
        ConfigError: no run has such a metric.
    """
    runs = read_results(planned_runs, baseline=BASELINE, metric=metric, on_test=planned.test is not None)
    norms = {key: norm for key, run in runs.runs.items() if (norm := _norm(run, planned.layers)) is not None}
    clients = list(planned.partition.clients)
    return AttackResults(
        runs=runs,
        pairs=pairs,
        refused=refused,
        malicious=clients[:malicious],
        clients=len(clients),
        norms=norms,
    )


def _norm(run: RunResult, layers: Mapping[str, Layer]) -> float | None:
    """``||W^T - W^0||`` of the adapted layers; None for runs without a finished global model."""
    if run.state != "finished" or not run.config.method.traits.global_model:
        return None
    folder = RunFolder(run.folder)
    server = build_server(run.config, initial_state(run.config, layers))
    checkpoints = Checkpoints(folder.checkpoints, run.config.checkpoint)
    try:
        restore_server(server, folder, checkpoints, lambda note: None)
    except FedSmoothLoRAError:
        return None
    norms = [
        delta.norm() if isinstance(delta, LowRank) else float(torch.linalg.vector_norm(delta))
        for delta in global_model(server).deltas.values()
    ]
    return math.hypot(*norms)
