"""A federation of the user's own model and data, from Python."""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from rich.console import Console
from torch import nn

from fedsmoothlora import methods
from fedsmoothlora.callbacks import Callback
from fedsmoothlora.config import Sections, from_table
from fedsmoothlora.config.consistency import personal_reason
from fedsmoothlora.config.settings import CheckpointSettings
from fedsmoothlora.data.own import Indexed, OwnExamples
from fedsmoothlora.errors import ConfigError, DataError, ExportError
from fedsmoothlora.exports.base import Base
from fedsmoothlora.exports.card import Provenance, spent
from fedsmoothlora.exports.export import write_folder
from fedsmoothlora.exports.merged import merge
from fedsmoothlora.exports.trained import global_model
from fedsmoothlora.federation.assembly import (
    Participants,
    RunContext,
    assemble,
    check_class_weights,
    check_head_lr,
    check_row_losses,
)
from fedsmoothlora.federation.devices import check_device, device_notes
from fedsmoothlora.federation.engines import processes
from fedsmoothlora.federation.masked import check_engine
from fedsmoothlora.federation.settings import (
    EvaluationSettings,
    MachineSettings,
    ParticipationSettings,
    PersonalSettings,
    PrivacySettings,
    ServerSettings,
    TransportSettings,
    UploadSettings,
)
from fedsmoothlora.federation.simulation import Simulation
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.modeling.adapters import AdaptedModel, are_rewritten, client_ranks, find_layers, on_device
from fedsmoothlora.modeling.fingerprint import weights_sha256
from fedsmoothlora.modeling.roles import resolve_roles
from fedsmoothlora.modeling.settings import LoraSettings
from fedsmoothlora.runs import privacy_lines
from fedsmoothlora.runs.result import Result
from fedsmoothlora.runs.session import RunSpec, carry_out
from fedsmoothlora.storage.arrivals import check_replay
from fedsmoothlora.tasks.objectives import Objective
from fedsmoothlora.tasks.objectives.classification import Classification
from fedsmoothlora.tasks.objectives.language import CausalLanguageModel
from fedsmoothlora.training.devices import accelerator_for
from fedsmoothlora.training.settings import TrainingSettings


@dataclass(frozen=True, kw_only=True)
class FederationSettings(Sections):
    """The settings of a federation whose model and data come from Python, beside those of `Sections`.

    Attributes:
        model: SHA-256 of the model's parameters and buffers, so that a run is resumed with the same model.
        clients: numbers of training rows by client.
        head: names of the modules that are trained whole.
    """

    model: str
    clients: Mapping[str, int]
    head: tuple[str, ...] = ()


class FederationSections(TypedDict, total=False):
    """The sections that `Federation` takes: an instance of the settings class, or a table of its keys."""

    seed: int
    lora: LoraSettings | Mapping[str, Any]
    training: TrainingSettings | Mapping[str, Any]
    server: ServerSettings | Mapping[str, Any]
    participation: ParticipationSettings | Mapping[str, Any]
    transport: TransportSettings | Mapping[str, Any]
    uploads: UploadSettings | Mapping[str, Any]
    privacy: PrivacySettings | Mapping[str, Any]
    personal: PersonalSettings | Mapping[str, Any]
    evaluation: EvaluationSettings | Mapping[str, Any]
    checkpoint: CheckpointSettings | Mapping[str, Any]
    machine: MachineSettings | Mapping[str, Any]


class Federation:
    """Several parties improve one model; each keeps its data.

    Args:
        model: any ``nn.Module`` with linear layers, in float32 or bfloat16, or quantised by bitsandbytes (see
            docs/quantised.md). It is not changed: the federation works on a copy. It is called with a
            batch's inputs and returns logits ``(rows, classes)``, or an object that has them as ``logits``.
        clients: each client's training data, by its id or in order: map-style data sets of
            ``(input, label)`` pairs, or of dictionaries of the model's inputs and ``labels``. Rows with
            ``input_ids`` may differ in length; ``labels`` is a class, or for a causal language model a token
            for each of them, -100 where no loss is taken. Labels keep their type: integers of any width (as
            int64) for these two, and anything that an ``objective`` of your own takes, such as floats.
        method: the name of a method, see `fedsmoothlora list methods`; or a method of your own, an instance
            of a subclass of `fedsmoothlora.methods.Method`, such as ``MyMethod(gamma=64)``.
        options: a named method's options, such as ``{"gamma": 512}``.
        head: names of the modules that are trained and averaged whole, such as ``["classifier"]``.
        test: a test set for the global model.
        validation: validation data by client, for metrics by client; without ``test``, their mean weighted
            by size stands for the global model.
        objective: loss and metrics, a `fedsmoothlora.tasks.objectives.Objective`. By default those of a
            causal language model where there is one label per token, else of single-label classification.
        settings: further sections by name, as instances of the settings classes or as tables of their keys:
            ``lora=LoraSettings(r=4, target_modules=("fc1",)), training={"rounds": 5, "lr": 0.01}, seed=1``.
            With ``machine={"jobs": 4}`` four clients train at once, in forked processes, so that a data set
            with an open file must bear being read from several, as with the workers of a ``DataLoader``.

    Raises:
        ConfigError: a setting or an argument is not valid, for instance because the model has no such layer.
        DataError: a data set is empty, or its rows are of another form.
        PrecisionError: the model's weights have a dtype that cannot be trained like this.
    """

    def __init__(
        self,
        model: nn.Module,
        clients: Mapping[Any, Indexed] | Sequence[Indexed],
        *,
        method: str | methods.Method = "fedsmoothlora",
        options: Mapping[str, Any] | None = None,
        head: Sequence[str] = (),
        test: Indexed | None = None,
        validation: Mapping[Any, Indexed] | None = None,
        objective: Objective | None = None,
        **settings: Unpack[FederationSections],
    ) -> None:
        if not isinstance(clients, Mapping):
            clients = dict(enumerate(clients))
        if not clients:
            raise ConfigError("a federation needs at least one client")
        if test is None and not validation:
            raise ConfigError("give test= or validation=: without either, no round can be evaluated")
        # Decoders with a classification head find the end of a row by this token.
        pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
        for given in (clients, validation or {}):
            _check_ids(given)
        self._clients = {str(id): OwnExamples(data, f"client {id}", pad) for id, data in clients.items()}
        self._test = None if test is None else OwnExamples(test, "test", pad)
        self._validation = {
            str(id): OwnExamples(data, f"validation of client {id}", pad)
            for id, data in (validation or {}).items()
        }
        if unknown := sorted(self._validation.keys() - self._clients.keys()):
            raise ConfigError(
                f"validation data for {unknown}, who are not among the clients {sorted(self._clients)}"
            )
        if options and isinstance(method, methods.Method):
            raise ConfigError(
                "options= belong to the name of a method; a method of your own has them already"
            )
        _check_head(model, head)
        table = {
            **settings,
            "model": weights_sha256(model),
            "clients": {client: len(data) for client, data in self._clients.items()},
            "head": list(head),
            "method": method if isinstance(method, methods.Method) else {"name": method, **(options or {})},
        }
        asked = from_table(FederationSettings, table, "Federation")
        self.settings: FederationSettings = replace(asked, lora=resolve_roles(model, asked.lora, asked.head))
        check_device(self.settings.machine)
        processes.check(self.settings.machine.jobs, self.settings.machine.device)
        self.settings.participation.check(len(self._clients), self.settings.uploads.min_clients)
        self.settings.participation.check_speeds(list(self._clients))
        check_replay(self.settings.participation, self._clients, self.settings.training.rounds)
        self.settings.server.check(self.settings.participation.merged(len(self._clients)))
        check_engine(self.settings.privacy.secure_aggregation)
        privacy_lines.check_privacy(self.settings, self._rows)
        if self.settings.privacy.on and self._validation:
            raise ConfigError(
                f"validation= with privacy.unit = {self.settings.privacy.unit!r}: no metric of a client's "
                "rows leaves it; give test="
            )
        if (reason := personal_reason(self.settings)) and not self._validation:
            raise ConfigError(f"{reason}: personal models are measured on validation rows; give validation=")
        if not self.settings.evaluation.test:
            if not self._validation:
                raise ConfigError("evaluation.test = false leaves nothing to evaluate on: give validation=")
            self._test = None
        self._original = model
        by_token = next(iter(self._clients.values())).labels_tokens
        self._objective: Objective = objective or (CausalLanguageModel() if by_token else Classification())
        self._check_labels()
        check_class_weights(self.settings.training, self._objective, self._clients)
        check_row_losses(self.settings.privacy, self._objective)
        accumulation = self.settings.training.accumulation
        if accumulation > 1 and not hasattr(self._objective, "parts"):
            raise ConfigError(
                f"training.accumulation = {accumulation}: the given objective has no parts(), "
                "which cuts a batch; see fedsmoothlora.tasks.objectives.Objective"
            )
        self._check_tokens()
        self._ranks = client_ranks(
            self.settings.lora, self.settings.method, {id: len(data) for id, data in self._clients.items()}
        )
        self._accelerator = accelerator_for(self.settings.machine.device)
        self._simulation: Simulation | None = None
        # Checked here, trained by the first run; later runs begin with a model of their own.
        self._untrained: AdaptedModel | None = self._adapted()
        check_head_lr(self.settings.training, self._untrained)
        if self._untrained.layers:
            self._check_method(self._untrained)
        elif not head:
            raise ConfigError("nothing to train: lora.target_modules is empty, and head names no module")

    @property
    def _rows(self) -> dict[str, int | None]:
        """The number of training rows of every client."""
        return {client: len(data) for client, data in self._clients.items()}

    def _check_tokens(self) -> None:
        """Refuse ``training.tokens_per_batch`` for batches or objectives that cannot be cut by tokens."""
        most = self.settings.training.tokens_per_batch
        if most is None:
            return
        parts = getattr(type(self._objective), "parts", None)
        if parts is None or not parts.__module__.startswith("fedsmoothlora."):
            raise ConfigError(
                f"training.tokens_per_batch = {most}: only the package's own objectives cut batches by "
                "tokens; derive from one of them, or use training.accumulation"
            )
        for client, rows in self._clients.items():
            if "input_ids" not in rows.batch([0]):
                raise ConfigError(
                    f"training.tokens_per_batch = {most}: the rows of client {client} have no input_ids; use "
                    "training.accumulation"
                )

    def _check_labels(self) -> None:
        """Refuse labels that the objective cannot use, by the first row of every data set."""
        if not hasattr(self._objective, "check_labels"):
            return
        named = {
            **{f"client {client}": rows for client, rows in self._clients.items()},
            **{f"validation of client {client}": rows for client, rows in self._validation.items()},
            **({} if self._test is None else {"test": self._test}),
        }
        for name, rows in named.items():
            try:
                self._objective.check_labels(rows.first_label)
            except DataError as error:
                raise DataError(f"{name}: {error}") from None

    def _check_method(self, adapted: AdaptedModel) -> None:
        """Refuse a method that does not fit the layers, or trains weights which must not be rewritten."""
        method = self.settings.method
        if method.trains_weights and not are_rewritten(adapted.modules.values()):
            raise ConfigError(
                f"method {method.name!r} trains the weights of the adapted layers, which must be float32 and "
                "are quantised or of low precision here: take a method that trains LoRA"
            )
        partial = self.settings.participation.partial(len(self._clients))
        method.check(adapted.layers, partial=partial)

    @property
    def _lora(self) -> LoraSettings:
        """``[lora]`` with the scale that the number of clients gives."""
        return self.settings.lora.for_clients(self.settings.participation.merged(len(self._clients)))

    def _adapted(self) -> AdaptedModel:
        """A copy of the given model with its LoRA, before any training."""
        own = self.settings
        return AdaptedModel(
            on_device(self._working_copy(), self._accelerator.device),
            self._lora,
            head=own.head,
            head_is_trained_whole=bool(own.head),
            ranks=set(self._ranks.values()),
            keep_weights=own.machine.keep_weights,
            compile=own.machine.compile,
        )

    def _begin(self, context: RunContext) -> Simulation:
        """A simulation before its first round."""
        self._simulation = None  # so that two are never in memory at once
        adapted, self._untrained = self._untrained or self._adapted(), None
        participants = Participants(
            clients=self._clients, validation=self._validation, test=self._test, ranks=self._ranks
        )
        self._simulation = assemble(
            self.settings,
            adapted,
            self._objective,
            participants,
            accelerator=self._accelerator,
            context=context,
        )
        return self._simulation

    def _working_copy(self) -> nn.Module:
        """A copy of the given model, which shares the weights that training does not change."""
        original, own = self._original, self.settings
        layers = find_layers(original, self._lora, own.head, head_is_trained_whole=bool(own.head))
        # By identity, since a weight that is tied to a changing one has another name.
        adapted = [original.get_submodule(name) for name in layers]
        changing = {id(module.weight) for module in adapted} if are_rewritten(adapted) else set()
        changing |= {id(value) for part in own.head for value in original.get_submodule(part).parameters()}
        shared = {
            id(parameter): nn.Parameter(parameter.data, requires_grad=False)
            for parameter in original.parameters()
            # Quantised weights have further state beside their values, which their own copy includes.
            if id(parameter) not in changing and parameter.is_floating_point()
        }
        return copy.deepcopy(original, dict(shared))

    def run(
        self,
        out: str | Path | None = None,
        *,
        resume: bool = False,
        console: Console | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> Result:
        """Run all rounds, starting from the given model. Every call is a new run, or resumes one.

        Args:
            out: the run's folder; ``runs/federation-TIME`` unless given.
            resume: resume the run in ``out``; the federation must have the same arguments.
            console: where progress is shown; standard output unless given.
            callbacks: notified of every step of the run.

        Returns:
            The folder and its metrics.

        Raises:
            ConfigError: ``out`` is in use, or the run in it has other settings.
            StorageError: a file cannot be written; the run can be resumed.
            FederationStoppedError: too few uploads could be used in a round.
            InterruptedRunError: Ctrl-C or SIGTERM; the run can be resumed.
        """
        torch.set_num_threads(self.settings.machine.threads)

        spec = RunSpec(
            settings=self.settings,
            name="federation",
            checkpoint=self.settings.checkpoint,
            notes=[
                *processes.notes(self.settings.machine.jobs, self.settings.machine.threads),
                *device_notes(self.settings.machine),
                *privacy_lines.warnings(self.settings),
                *privacy_lines.forecast(self.settings, self._rows),
            ],
            how_to_resume="Federation(...).run(out='{folder}', resume=True), with the same arguments",
        )
        return carry_out(spec, self._begin, out=out, resume=resume, console=console, callbacks=callbacks)

    def model(self) -> nn.Module:
        """A copy of the given model with the last run's global weights and head, without LoRA.

        Before the first run, it equals the given model.

        Raises ``NotKeptError`` for a method without a global model.
        """
        merged = copy.deepcopy(self._original)
        if self._simulation is not None:
            merge(global_model(self._simulation.server), merged)
        return merged

    def save_adapter(self, out: str | Path, rank: int | None = None) -> Path:
        """Write the last run's result as a PEFT LoRA on the given model, with the whole head.

        ``PeftModel.from_pretrained(model, out)`` has the outputs of `model`. `fedsmoothlora.load_adapter`
        refuses other base models.

        Args:
            out: a new or empty folder.
            rank: the highest rank of a layer, for an approximation; exact unless given.

        Raises ``NotKeptError`` for a method without a global model, ``ExportError`` if ``out`` is in use or
        no round is finished.
        """
        if self._simulation is None or not self._simulation.server.round:
            raise ExportError("no round is finished, so there is no adapter to save: call run() first")
        server, own = self._simulation.server, self.settings
        provenance = Provenance(
            name="federation",
            source=None,
            revision=None,
            data=None,
            method=own.method.name,
            rounds=server.round,
            planned_rounds=server.rounds,
            clients=len(self._clients),
            client=None,
            task=None,
            privacy=spent(server),
        )
        base = Base(model=copy.deepcopy(self._original), head=own.head)
        as_ = "adapter" if rank is None else f"adapter:{rank}"
        with quiet_libraries():
            write_folder(global_model(server), base, provenance, as_, Path(out))
        return Path(out)


def _check_ids(given: Mapping[Any, Indexed]) -> None:
    """Refuse ids that are the same as text, of which only one would take part."""
    if twice := [id for id, count in Counter(map(str, given)).items() if count > 1]:
        raise ConfigError(f"two clients have the id {twice[0]!r}: ids are texts, and 1 is the same as '1'")


def _check_head(model: nn.Module, head: Sequence[str]) -> None:
    if isinstance(head, str):
        raise ConfigError(f"head={head!r} must be a list of names: head=[{head!r}]")
    known = {name: module for name, module in model.named_modules() if name}
    for name in head:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; its modules are {', '.join(known)}"
            raise ConfigError(f"head: the model has no module {name!r}{hint}")
