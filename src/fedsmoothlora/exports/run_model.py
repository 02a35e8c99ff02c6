"""The model of a run, from a checkpoint in its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsmoothlora.config import Config, absolute_paths, read_run_config
from fedsmoothlora.errors import ExportError
from fedsmoothlora.exports.base import Base, load_base, task_of
from fedsmoothlora.federation.assembly import RunContext, build_server, initial_state
from fedsmoothlora.federation.server import Server
from fedsmoothlora.modeling.adapters import AdaptedModel, find_layers
from fedsmoothlora.modeling.backbone import Backbone
from fedsmoothlora.modeling.settings import LoraSettings
from fedsmoothlora.storage.checkpoints import Checkpoints
from fedsmoothlora.storage.inputs import MODEL, base_model, check_config, check_inputs
from fedsmoothlora.storage.privacy_ledger import StoredLedger
from fedsmoothlora.storage.restoring import restore_server
from fedsmoothlora.storage.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class RunModel:
    """The model of a run at a checkpoint.

    Attributes:
        config: the configuration of the run, with absolute paths.
        task: the task of its model, in the hub's words.
        server: the server as it was at the checkpoint.
        partition: the content of ``partition.json``.
        metrics: the lines of ``metrics.jsonl``.
    """

    config: Config
    task: str | None
    server: Server
    partition: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the model's outputs in their order, such as its classes; empty if the task has none."""
        if "outputs" in self.partition:
            return tuple(self.partition["outputs"])
        return tuple(self.partition["classes"]) if self.config.task.classifies else ()

    @property
    def prompt(self) -> dict[str, Any] | None:
        """The template of prompts, for `fedsmoothlora.exports.generation.Prompting`; None without prompts."""
        return self.config.task.prompt_format_of(self.partition.get("form"))

    def base(self) -> Base:
        """A new copy of the pretrained model."""
        return load_base(self.config, self.classes)


def open_run(path: Path) -> RunFolder:
    """Open a run's folder to export its model.

    Raises ``ExportError`` if it is none, or was made by `Federation`.
    """
    try:
        folder = RunFolder.open(path)
    except FileNotFoundError as error:
        raise ExportError(str(error)) from None
    if not (path / "partition.json").is_file():
        raise ExportError(
            f"the run in {path} was made by Federation(...) in Python, from a model that is in no file: use "
            "federation.model() or federation.save_adapter(DIR) there"
        )
    return folder


def load_run_model(
    folder: RunFolder, note: Callable[[str], None], round: int | None = None, *, of_client: bool = False
) -> RunModel:
    """A run's model at its newest checkpoint. Neither data nor weights are loaded.

    Args:
        folder: the run's folder.
        note: called with a sentence for every checkpoint that is skipped.
        round: use the checkpoint after this many rounds.
        of_client: the model of a client is wanted, which some methods compute from the pretrained weights.
            These are loaded if the method asks for them.

    Raises:
        ExportError: no round is finished, or no model of transformers computes it.
        StateError: no checkpoint can be used, or the base weights or the configuration have changed since
            the run began.
    """
    check_config(folder)
    config = absolute_paths(read_run_config(folder.config))
    if (reason := config.task.why_not_saved) is not None:
        raise ExportError(f"{folder.path}: {reason}")
    check_inputs(folder, {MODEL: base_model(config)})
    partition = folder.read_json("partition.json", "classes", "clients")
    classes = folder.classes
    model = config.model.unquantised()
    empty = config.task.load_model(model, classes, config.seed, empty=True)
    clients = len(config.flower.clients) or partition.get("client_count", len(partition["clients"]))
    lora = config.lora.for_clients(config.participation.merged(clients))
    layers = find_layers(empty.model, lora, empty.head, head_is_trained_whole=config.model.head == "full")
    pretrained = _pretrained_weights(config, lora, classes) if of_client else None
    ledger = StoredLedger(folder.privacy)
    server = build_server(
        config, initial_state(config, layers, pretrained), context=RunContext(ledger=ledger)
    )
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    if restore_server(server, folder, checkpoints, note, round) is None or not server.round:
        raise ExportError(f"{folder.path} has no finished round, so its model is the pretrained one")
    if server.private is not None:
        ledger.check(server.round)
    return RunModel(
        config=config,
        task=task_of(empty.model),
        server=server,
        partition=partition,
        metrics=folder.metrics(),
    )


def _pretrained_weights(
    config: Config, lora: LoraSettings, classes: Sequence[str]
) -> Callable[[str], Tensor]:
    """The pretrained weight of a layer, ``(m, n)``, as in the run; the model is loaded at the first call."""

    @cache
    def backbone() -> Backbone:
        loaded = config.task.load_model(config.model, classes, config.seed)
        whole = config.model.head == "full"
        return AdaptedModel(loaded.model, lora, head=loaded.head, head_is_trained_whole=whole).backbone

    return lambda name: backbone().pretrained(name)
