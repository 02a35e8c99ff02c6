"""One run with malicious clients: its attack, and how the run is carried out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import Config
from fedsmoothlora.data.examples import Batch
from fedsmoothlora.experiments import attacks
from fedsmoothlora.experiments.attack_suite.forging import ForgingEngine
from fedsmoothlora.experiments.attacks import Attack, DataAttack, Setting, Success, UploadAttack
from fedsmoothlora.federation.assembly import Participants, RunContext, engine_of
from fedsmoothlora.federation.simulation import Engine, Simulation
from fedsmoothlora.runs.planning import LoadedModel, Plan, build, load, participants_of, plan
from fedsmoothlora.runs.result import Result
from fedsmoothlora.runs.session import carry_out, run_spec
from fedsmoothlora.storage.inputs import ATTACK
from fedsmoothlora.tasks.metrics import Measurement
from fedsmoothlora.tasks.objectives import Objective

_SUCCESS = "attack_success_"


def success_metric(attack: Attack) -> str:
    """The name under which the success of an attack is recorded."""
    return _SUCCESS + attack.label


@dataclass(frozen=True, kw_only=True)
class Threat:
    """The malicious clients of a run.

    Attributes:
        malicious: their number; they are the first clients of the partition.
        attack: the attack; None for the attack-free run, from which these clients are left out.
        measured: the attacks whose success is measured.
    """

    malicious: int
    attack: Attack | None = None
    measured: tuple[DataAttack, ...] = ()

    def table(self) -> dict[str, Any]:
        """The threat as plain JSON values."""
        return {
            "malicious": self.malicious,
            "attack": None if self.attack is None else self.attack.table(),
            "measured": [attack.table() for attack in self.measured],
        }

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Threat:
        """The opposite of `table`."""
        attack = table["attack"]
        measured = map(attacks.from_table, table["measured"])
        return cls(
            malicious=table["malicious"],
            attack=None if attack is None else attacks.from_table(attack),
            measured=tuple(one for one in measured if isinstance(one, DataAttack)),
        )

    def setting(self, planned: Plan) -> Setting:
        """The malicious clients of a plan."""
        return Setting(planned=planned, malicious=list(planned.partition.clients)[: self.malicious])


def run_threatened(
    config: Config,
    threat: Threat,
    *,
    out: Path | None,
    resume: Path | None,
    console: Console,
    callbacks: Sequence[Callback],
) -> Result:
    """Run a federation with malicious clients in a folder of its own; only metrics are written at the end.

    Raises the errors of `fedsmoothlora.runs.session.run`.
    """
    torch.set_num_threads(config.machine.threads)
    planned = plan(config)
    spec = run_spec(planned)
    spec = replace(
        spec,
        inputs={**spec.inputs, ATTACK: replace(threat, measured=()).table()},
        how_to_resume="repeat the fedsmoothlora attack command",
    )
    return carry_out(
        spec,
        lambda context: build_threatened(planned, threat, context),
        out=resume or out,
        resume=resume is not None,
        console=console,
        verbosity=-1,
        callbacks=callbacks,
        outputs=False,
    )


def build_threatened(planned: Plan, threat: Threat, context: RunContext | None = None) -> Simulation:
    """Build the planned federation with its malicious clients, ready for round 0."""
    setting = threat.setting(planned)
    loaded = load(planned)
    engine: Engine = engine_of(planned.config.machine)
    if isinstance(threat.attack, UploadAttack):
        engine = ForgingEngine(engine=engine, attack=threat.attack, malicious=setting.malicious)
    return build(
        planned,
        context,
        loaded=loaded,
        participants=_participants(threat, setting, loaded),
        engine=engine,
    )


def _participants(threat: Threat, setting: Setting, loaded: LoadedModel) -> Participants:
    """The clients with the malicious ones' rows changed, or without them in the attack-free run."""
    planned, malicious = setting.planned, setting.malicious
    found = participants_of(planned)
    clients = dict(found.clients)
    if threat.attack is None:
        clients = {client: rows for client, rows in clients.items() if client not in malicious}
    elif isinstance(threat.attack, DataAttack):
        clients |= {client: threat.attack.poisoned(setting, client) for client in malicious}
    successes = {success_metric(attack): attack.success(setting) for attack in threat.measured}
    measured = {name: success for name, success in successes.items() if success is not None}
    return replace(
        found,
        clients=clients,
        # Of honest clients only, so that the metrics of all runs are over the same rows.
        validation={client: rows for client, rows in found.validation.items() if client not in malicious},
        ranks={client: rank for client, rank in found.ranks.items() if client in clients},
        measurement=SuccessMeasurement(
            measured, loaded.objective, planned.config.evaluation.batch_size, found.measurement
        )
        if measured
        else found.measurement,
    )


@dataclass(frozen=True, eq=False)
class SuccessMeasurement:
    """The success of attacks at the end of a run, as a measurement of the global model.

    Attributes:
        successes: the rows and the target of each attack, by the metric's name.
        objective: evaluates the rows.
        batch_size: rows in each batch.
        other: the measurement that is configured, if there is one.
    """

    successes: Mapping[str, Success]
    objective: Objective
    batch_size: int
    other: Measurement | None = None

    def due(self, round: int, rounds: int) -> bool:
        """At the end, and whenever the other measurement is."""
        return round == rounds or (self.other is not None and self.other.due(round, rounds))

    def take(self, model: nn.Module, to_device: Callable[[Batch], Batch]) -> dict[str, float]:
        """The share of rows that are classified as the target, by name."""
        found = {} if self.other is None else self.other.take(model, to_device)
        for name, success in self.successes.items():
            confusion = self.objective.evaluate(model, success.examples, self.batch_size, to_device).confusion
            if confusion is not None:
                found[name] = float(confusion[:, success.target].sum() / confusion.sum())
        return found
