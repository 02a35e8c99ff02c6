"""A federation of the user's own model and data, from Python."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn

from fedsmoothlora import methods
from fedsmoothlora.adapters import AdaptedModel, LoraSettings
from fedsmoothlora.client import Learner
from fedsmoothlora.config import EvaluationSettings, MachineSettings, from_table
from fedsmoothlora.data.own import Indexed, OwnExamples
from fedsmoothlora.export import write_merged
from fedsmoothlora.origin import Origin
from fedsmoothlora.participation import ParticipationSettings
from fedsmoothlora.rounds import Simulation
from fedsmoothlora.running import Result, keep_running
from fedsmoothlora.server import Server
from fedsmoothlora.state import CheckpointSettings
from fedsmoothlora.tasks import Classification, Task
from fedsmoothlora.training import TrainingSettings
from fedsmoothlora.uploads import UploadSettings


@dataclass(frozen=True, kw_only=True)
class FederationSettings:
    """The sections of a configuration that do not name a model or data; see `fedsmoothlora.config.Config`.

    Attributes:
        seed: of everything that is drawn.
        lora: ``[lora]``.
        method: ``[method]``.
        training: ``[training]``.
        participation: ``[participation]``.
        uploads: ``[uploads]``.
        evaluation: ``[evaluation]``.
        checkpoint: ``[checkpoint]``.
        machine: ``[machine]``.
    """

    method: methods.Method
    seed: int = 0
    lora: LoraSettings = field(default_factory=LoraSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    participation: ParticipationSettings = field(default_factory=ParticipationSettings)
    uploads: UploadSettings = field(default_factory=UploadSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    machine: MachineSettings = field(default_factory=MachineSettings)


class Federation:
    """Several parties improve one model; each keeps its data.

    Args:
        model: any ``nn.Module`` with float32 linear layers. It is not changed: the federation works on a
            copy. It is called with a batch's inputs and returns logits ``(rows, classes)``, or an object
            that has them as ``logits``.
        clients: each client's training data, by its id or in order: map-style data sets of
            ``(input, label)`` pairs, or of dictionaries of the model's inputs and ``labels``.
        method: its name; see `fedsmoothlora list methods`.
        options: the method's own keys, such as ``{"gamma": 512}``.
        head: names of the modules that are trained and averaged whole, such as ``["classifier"]``.
        test: a test set for the global model.
        validation: validation data by client, for figures by client; without ``test``, their mean weighted
            by size stands for the global model.
        task: loss and metrics; single-label classification unless given.
        settings: further sections by name, as tables with a configuration's keys:
            ``lora={"r": 4, "target_modules": ["fc1"]}, training={"rounds": 5, "lr": 0.01}, seed=1``.

    Raises:
        ConfigError: a setting cannot be right.
        ValueError: the model has no such layer, a data set is empty, or there is nothing to evaluate on.
    """

    def __init__(
        self,
        model: nn.Module,
        clients: Mapping[str, Indexed] | Sequence[Indexed],
        *,
        method: str = "fedsmoothlora",
        options: Mapping[str, Any] | None = None,
        head: Sequence[str] = (),
        test: Indexed | None = None,
        validation: Mapping[str, Indexed] | None = None,
        task: Task | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(clients, Mapping):
            clients = {str(number): data for number, data in enumerate(clients)}
        if not clients:
            raise ValueError("a federation needs at least one client")
        if test is None and not validation:
            raise ValueError("give test= or validation=: without either, no round can be evaluated")
        if unknown := sorted((validation or {}).keys() - clients.keys()):
            raise ValueError(
                f"validation data for {unknown}, who are not among the clients {sorted(clients)}"
            )
        table = {**settings, "method": {"name": method, **(options or {})}}
        self.settings: FederationSettings = from_table(FederationSettings, table, "Federation")
        self._original = model
        own = self.settings
        accelerator = Accelerator(cpu=own.machine.device == "cpu")
        adapted = AdaptedModel(
            copy.deepcopy(model).to(accelerator.device),
            own.lora,
            head=tuple(head),
            head_is_trained_whole=bool(head),
        )
        if adapted.layers:
            partial = own.participation.count(len(clients)) < len(clients)
            own.method.check(adapted.layers, partial=partial)
        elif not head:
            raise ValueError("nothing to train: lora.target_modules is empty, and head names no module")
        origin = Origin(adapted.layers, own.seed, adapted.backbone.pretrained)
        self._simulation = Simulation(
            server=Server(
                method=own.method,
                layers=adapted.layers,
                origin=origin,
                rounds=own.training.rounds,
                head=adapted.head(),
            ),
            learner=Learner(
                model=adapted,
                method=own.method,
                task=task or Classification(),
                training=own.training,
                accelerator=accelerator,
                origin=origin,
            ),
            clients={client: OwnExamples(data, f"client {client}") for client, data in clients.items()},
            test=None if test is None else OwnExamples(test, "test"),
            validation={
                client: OwnExamples(data, f"validation of client {client}")
                for client, data in (validation or {}).items()
            },
            evaluation_batch_size=own.evaluation.batch_size,
            evaluate_clients=own.evaluation.clients,
            participation=own.participation,
            uploads=own.uploads,
        )

    def run(
        self, out: str | Path | None = None, *, resume: bool = False, console: Console | None = None
    ) -> Result:
        """Run all rounds.

        Args:
            out: the run's folder; ``runs/federation-TIME`` unless given.
            resume: go on with the run in ``out``, by a federation made with the same arguments.
            console: where progress is shown; standard output unless given.

        Returns:
            The folder and its metrics.

        Raises:
            ConfigError: ``out`` is in use, or the settings of the run in it are others.
            FederationStoppedError: too few uploads could be used in a round.
            InterruptedRunError: Ctrl-C; the run can be resumed.
        """
        torch.set_num_threads(self.settings.machine.threads)
        return keep_running(
            lambda: self._simulation,
            self.settings,
            name="federation",
            checkpoint=self.settings.checkpoint,
            out=out,
            resume=resume,
            console=console,
            how_to_resume="Federation(...).run(out='{folder}', resume=True), with the same arguments",
        )

    def model(self) -> nn.Module:
        """A copy of the given model with the global weights and head, as they stand now; no LoRA in it."""
        merged = copy.deepcopy(self._original)
        write_merged(self._simulation, merged)
        return merged
