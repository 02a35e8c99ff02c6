"""What a run came to, from its folder: its checkpoint's server, and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsmoothlora.config import Config, read_run_config
from fedsmoothlora.errors import ExportError
from fedsmoothlora.exports.base import Base, load_base, task_of
from fedsmoothlora.federation.assembly import build_server, initial_state
from fedsmoothlora.federation.server import Server
from fedsmoothlora.modeling.adapters import find_layers
from fedsmoothlora.storage.checkpoints import Checkpoints
from fedsmoothlora.storage.restoring import restore_server
from fedsmoothlora.storage.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class RunModel:
    """A run at a checkpoint, as far as its model is concerned.

    Attributes:
        config: the run's.
        task: what its model is for, by the hub's name.
        server: as the checkpoint has it.
        partition: what ``partition.json`` says.
        metrics: the lines of ``metrics.jsonl``.
    """

    config: Config
    task: str | None
    server: Server
    partition: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that it tells apart, in the order of their labels."""
        return tuple(self.partition["classes"]) if self.config.task.classifies else ()

    @property
    def prompt(self) -> dict[str, Any] | None:
        """Template of prompts, for `fedsmoothlora.exports.generation.Prompting`; None without prompts."""
        return self.config.task.prompt_format

    def base(self) -> Base:
        """The pretrained model, a fresh copy."""
        return load_base(self.config, self.classes)


def open_run(path: Path) -> RunFolder:
    """A run's folder, from which a model can be had.

    Raises ``ExportError`` where it is none, or was made by `Federation`.
    """
    try:
        folder = RunFolder.open(path)
    except FileNotFoundError as error:
        raise ExportError(str(error)) from None
    if not (path / "partition.json").is_file():
        raise ExportError(
            f"the run in {path} was made by Federation(...) in Python, from a model that is in no file: "
            "there, federation.model() and federation.save_adapter(DIR) give what it came to"
        )
    return folder


def load_run_model(folder: RunFolder, note: Callable[[str], None], round: int | None = None) -> RunModel:
    """A run's model as its newest checkpoint has it; neither data nor weights are loaded.

    Args:
        folder: the run's.
        note: told of checkpoints that are passed over.
        round: take the checkpoint after this many rounds.

    Raises:
        ExportError: nothing was trained yet, or no model of transformers computes it.
        StateError: no checkpoint can be used.
    """
    config = read_run_config(folder.path / "config.toml")
    if (reason := config.task.why_not_saved) is not None:
        raise ExportError(f"{folder.path}: {reason}")
    partition = folder.read_json("partition.json")
    model = config.model.unquantised()
    empty = config.task.load_model(model, partition["classes"], config.seed, empty=True)
    layers = find_layers(
        empty.model, config.lora, empty.head, head_is_trained_whole=config.model.head == "full"
    )
    server = build_server(config, initial_state(config, layers))
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
    if restore_server(server, folder, checkpoints, note, round) is None:
        raise ExportError(f"{folder.path} has no checkpoint yet: nothing was trained")
    return RunModel(
        config=config,
        task=task_of(empty.model),
        server=server,
        partition=partition,
        metrics=folder.metrics(),
    )
