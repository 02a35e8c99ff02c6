"""Run attacks against defences, over several seeds, and compare them with the attack-free run.

===========================  =========================================================
``attacks.toml``             the settings that all runs share, and every attack
``runs/ATTACK+DEFENCE/``     a run folder for each seed; ``none`` is the attack-free run
``attacks.csv``              one row for each attack and defence
``runs.csv``                 one row for each run
``attacks.md``               the tables of the page as Markdown
``attacks.html``             the page
===========================  =========================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedsmoothlora.config import Config, read
from fedsmoothlora.errors import ConfigError, InterruptedRunError
from fedsmoothlora.experiments import attacks
from fedsmoothlora.experiments.attack_suite import defences
from fedsmoothlora.experiments.attack_suite.results import BASELINE, AttackResults, Pair, read_attack_results
from fedsmoothlora.experiments.attack_suite.threat import Threat
from fedsmoothlora.experiments.attacks import Attack, DataAttack
from fedsmoothlora.experiments.execution import run_all, side_by_side
from fedsmoothlora.experiments.folder import remember
from fedsmoothlora.experiments.forecast import Forecast, forecast
from fedsmoothlora.experiments.planned_runs import PlannedRun
from fedsmoothlora.federation.masked import check_engine
from fedsmoothlora.runs.planning import Plan, plan
from fedsmoothlora.storage.files import write_text

__all__ = ["AttackSuite", "attack", "dry_run"]

ATTACKS = ("sign_flip", "scale", "one_layer", "label_flip", "backdoor")
DEFENCES = ("mean", "clip", "geometric_median", "multi_krum", "trimmed_mean")


@dataclass(frozen=True, kw_only=True)
class AttackSuite:
    """An attack suite and its results.

    Attributes:
        folder: the folder of the suite.
        results: metrics by attack, defence and seed.
        failed: why runs failed, by name of the run. A run that diverged is a result, not a failure.
    """

    folder: Path
    results: AttackResults
    failed: Mapping[str, str]

    @property
    def page(self) -> Path:
        """The path of the page."""
        return self.folder / "attacks.html"


def attack(
    config: str | Path | Mapping[str, Any],
    attacks: Sequence[str | Attack] = ATTACKS,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path,
    defences: Sequence[str] = DEFENCES,
    malicious: int = 1,
    seeds: int = 3,
    jobs: int = 1,
    metric: str | None = None,
    console: Console | None = None,
) -> AttackSuite:
    """Run every attack against every defence with every seed. Finished runs are not run again.

    All runs of a seed have the same partition, head and batches, so differences are paired. The first
    ``malicious`` clients of the partition are malicious. The attack-free runs leave them out: this is the
    best that a defence can achieve.

    Args:
        config: a TOML file, a recipe's name, or a table.
        attacks: attacks by name, or ``NAME:KEY=VALUE`` with options.
        overrides: values for all runs, by dotted key.
        out: the suite's folder. Attacks, defences and seeds can be added later; other settings cannot change.
        defences: ``mean``, ``clip``, and values of ``server.aggregation``.
        malicious: the number of malicious clients.
        seeds: the number of seeds.
        jobs: the number of runs at a time, as in `fedsmoothlora.experiments.compare.compare`.
        metric: a metric of the global model; by default ``accuracy``, or else the task's main metric.
        console: where progress is printed; standard output by default.

    Raises:
        ConfigError: an argument is invalid, or the folder holds another suite. Nothing was run.
        PackageError: a package that ships the model or the data is not available.
        InterruptedRunError: Ctrl-C; the same call continues.
    """
    console = console or Console()
    prepared = prepare(
        config, attacks, defences, overrides, out=Path(out), malicious=malicious, seeds=seeds, jobs=jobs
    )
    stopped = None
    try:
        run_all(list(prepared.planned_runs.values()), jobs, console)
    except InterruptedRunError as error:
        stopped = InterruptedRunError(f"{error}; the same command continues {out}")
    # After Ctrl-C too: the finished runs may already answer the question.
    results = read_attack_results(
        prepared.planned_runs,
        prepared.pairs,
        prepared.refused,
        planned=prepared.planned,
        malicious=malicious,
        metric=metric,
    )
    done = _written(results, prepared.planned_runs, Path(out), console)
    if stopped is not None:
        raise stopped
    return done


def dry_run(
    config: str | Path | Mapping[str, Any],
    attacks: Sequence[str | Attack] = ATTACKS,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path,
    defences: Sequence[str] = DEFENCES,
    malicious: int = 1,
    seeds: int = 3,
    jobs: int = 1,
    console: Console | None = None,
) -> dict[str, Forecast]:
    """Measure a few batches of each defence, and print how long `attack` will take. Nothing is written.

    Arguments and errors are those of `attack`.

    Returns:
        The forecast of one run by defence, for defences that have runs left. An attack takes no time.
    """
    prepared = prepare(
        config,
        attacks,
        defences,
        overrides,
        out=Path(out),
        malicious=malicious,
        seeds=seeds,
        jobs=jobs,
        begin=False,
    )
    wanted: dict[str, tuple[Config, int]] = {}
    for (label, _), planned_run in prepared.planned_runs.items():
        planned_run.check()
        defence = prepared.pairs[label].defence
        first, left = wanted.get(defence, (planned_run.config, 0))
        wanted[defence] = first, left + (planned_run.state in ("waiting", "failed"))
    return forecast(wanted, jobs, console or Console())


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An attack suite that was checked and can be run.

    Attributes:
        planned_runs: by label and seed, in the order in which they are run.
        pairs: attack and defence of each label.
        refused: why a pair is not run, by label.
        planned: the plan of the first run.
    """

    planned_runs: Mapping[tuple[str, int], PlannedRun]
    pairs: Mapping[str, Pair]
    refused: Mapping[str, str]
    planned: Plan


def prepare(
    config: str | Path | Mapping[str, Any],
    named: Sequence[str | Attack],
    defended: Sequence[str],
    overrides: Mapping[str, Any] | None = None,
    *,
    out: Path,
    malicious: int,
    seeds: int,
    jobs: int,
    begin: bool = True,
) -> Prepared:
    """Plan and check all runs before the first one starts; ``begin`` creates the folder."""
    if min(malicious, seeds, jobs) < 1:
        raise ConfigError(f"--malicious {malicious} --seeds {seeds} --jobs {jobs}: must be at least 1")
    if not named or not defended:
        raise ConfigError("name at least one attack (--attacks) and one defence (--defences)")
    found = _distinct([one if isinstance(one, Attack) else attacks.parsed(one) for one in named])
    changes = {defence: defences.overrides_of(defence, malicious) for defence in (defences.MEAN, *defended)}
    base = _base(config, overrides, jobs)
    planned = [plan(replace(base, seed=base.seed + k)) for k in range(seeds)]
    _check_clients(planned[0], malicious)
    setting = Threat(malicious=malicious).setting(planned[0])
    reasons = {one.label: one.refusal(setting) for one in found}
    pairs = {
        pair.label: pair
        for attack in (None, *found)
        for defence in changes
        # The mean without an attack is the baseline, so it is always run.
        if defence in defended or attack is None
        for pair in [Pair(attack=attack, defence=defence)]
    }
    clients = len(planned[0].partition.clients)
    configs: dict[str, Config] = {}
    refused: dict[str, str] = {}
    for label, pair in pairs.items():
        if reason := reasons.get(pair.attack_label):
            refused[label] = reason
            continue
        taking_part = clients - (malicious if pair.attack is None else 0)
        try:
            configs[label] = _defended(config, {**(overrides or {}), **changes[pair.defence]}, taking_part)
        except ConfigError as error:
            refused[label] = str(error)
    if BASELINE in refused:
        raise ConfigError(f"the attack-free run: {refused[BASELINE]}")
    if begin:
        more = {
            "malicious": malicious,
            "attack": {attack.label: attack.table() for attack in found},
        }
        base = remember(out / "attacks.toml", base, more)
    fitting = tuple(one for one in found if isinstance(one, DataAttack) and reasons[one.label] is None)
    planned_runs = {
        (label, seed): PlannedRun(
            f"{label}, seed {seed}",
            replace(one, seed=seed, name=f"{base.name}: {label}, seed {seed}", machine=base.machine),
            out / "runs" / label / f"seed-{seed}",
            _threat(pairs[label].attack, fitting, malicious),
        )
        for seed in range(base.seed, base.seed + seeds)
        for label, one in configs.items()
    }
    return Prepared(planned_runs=planned_runs, pairs=pairs, refused=refused, planned=planned[0])


def _distinct(given: Sequence[Attack]) -> list[Attack]:
    """The attacks, each once. Raises ``ConfigError`` if two different ones have the same label."""
    found: dict[str, Attack] = {}
    for one in given:
        if found.setdefault(one.label, one) != one:
            raise ConfigError(
                f"--attacks: two attacks would have the same folder, {one.label}: leave one out"
            )
    return list(found.values())


def _base(config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None, jobs: int) -> Config:
    """The configuration that all runs share. Raises ``ConfigError`` if it names a defence itself."""
    base = read(config, overrides)
    check_engine(base.privacy.secure_aggregation)
    given = base.server.aggregation, base.server.byzantine, base.uploads.clip_to_median
    if given != (defences.MEAN, None, False):
        raise ConfigError(f"{', '.join(defences.KEYS)}: --defences sets these keys; leave them out")
    return replace(base, machine=side_by_side(base.machine, jobs))


def _check_clients(planned: Plan, malicious: int) -> None:
    clients = len(planned.partition.clients)
    if 2 * malicious >= clients:
        raise ConfigError(
            f"--malicious {malicious} of {clients} clients: more than half of the clients must be honest"
        )


def _defended(config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any], clients: int) -> Config:
    """The configuration of a defence. Raises ``ConfigError`` with the reason if it does not fit."""
    found = read(config, overrides)
    found.participation.check(clients, found.uploads.min_clients)
    found.server.check(found.participation.merged(clients))
    return found


def _threat(attack: Attack | None, fitting: tuple[DataAttack, ...], malicious: int) -> Threat:
    """The threat of a run. The attack-free run measures the success of all attacks, for comparison."""
    if attack is None:
        return Threat(malicious=malicious, measured=fitting)
    measured = (attack,) if isinstance(attack, DataAttack) else ()
    return Threat(malicious=malicious, attack=attack, measured=measured)


def _written(
    results: AttackResults,
    planned_runs: Mapping[tuple[str, int], PlannedRun],
    out: Path,
    console: Console,
) -> AttackSuite:
    """Write tables and page, and print the main table."""
    # Imported here because matplotlib takes a while to load.
    from fedsmoothlora.experiments.attack_suite import tables
    from fedsmoothlora.experiments.attack_suite.page import page

    write_text(out / "attacks.csv", tables.pairs_csv(results))
    write_text(out / "runs.csv", tables.runs_csv(results))
    write_text(out / "attacks.md", tables.markdown(results))
    write_text(out / "attacks.html", page(results))
    console.print(tables.terminal(results))
    for line in tables.best_defences(results):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"tables: {out / 'attacks.md'}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"page:   {out / 'attacks.html'}", highlight=False, markup=False, soft_wrap=True)
    failed = {
        planned_run.name: planned_run.outcome()["reason"]
        for planned_run in planned_runs.values()
        if planned_run.state == "failed"
    }
    for name, reason in failed.items():
        console.print(f"failed: {name}: {reason}", style="red", highlight=False, markup=False, soft_wrap=True)
    return AttackSuite(folder=out, results=results, failed=failed)
