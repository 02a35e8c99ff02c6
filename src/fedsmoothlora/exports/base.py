"""The pretrained model that an export belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fedsmoothlora import tasks
from fedsmoothlora.config import Config
from fedsmoothlora.modeling.settings import ModelSettings


@dataclass(frozen=True, kw_only=True)
class Base:
    """A pretrained model with its processor.

    Attributes:
        model: a copy that may be modified.
        head: names of the head's modules.
        drawn: names of the parameters that the checkpoint lacks, drawn from the run's seed.
        write_processor: writes its tokenizer or image processor into a folder.
        arguments: arguments of its forward pass beside the inputs.
    """

    model: nn.Module
    head: tuple[str, ...] = ()
    drawn: frozenset[str] = frozenset()
    write_processor: Callable[[Path], None] = lambda folder: None
    arguments: Mapping[str, Any] = field(default_factory=dict)


def load_base(config: Config, classes: Sequence[str]) -> Base:
    """The pretrained model of a run in float32, also if the run used another precision.

    Parameters that the checkpoint lacks are drawn from the run's seed, as in the run.

    Raises ``ConfigError`` if the source is wrong, as `fedsmoothlora.modeling.loading.model_files`.
    """
    task, model = config.task, config.model.unquantised()
    loaded = task.load_model(model, classes, config.seed)
    return Base(
        model=loaded.model,
        head=loaded.head,
        drawn=loaded.drawn,
        write_processor=lambda folder: task.write_processor(model, folder),
        arguments=getattr(loaded, "arguments", {}),
    )


def task_of(model: nn.Module) -> str | None:
    """The task of a model of transformers, in the hub's words; None for other models."""
    from transformers.models.auto import modeling_auto

    tables = {
        task.hub_name: getattr(modeling_auto, task.auto_mapping) for task in map(tasks.find, tasks.names())
    }
    name = type(model).__name__
    return next((task for task, table in tables.items() if name in _flat(table.values())), None)


def whole_modules(base: Base, head: Iterable[str]) -> tuple[str, ...]:
    """Names of the modules that an adapter replaces whole.

    These are the modules whose parameters were trained whole (``head``) or drawn at random, and the head of
    every classifier of texts or tokens, because PEFT requires it. If a part of the head is replaced, all of
    it is.
    """
    changed = {*head, *base.drawn}
    if task_of(base.model) in ("text-classification", "token-classification"):
        changed |= {f"{part}.weight" for part in base.head}
    owners = {name.rpartition(".")[0] for name in changed if "." in name}
    found = {next((part for part in base.head if is_in(owner, [part])), owner) for owner in owners}
    return tuple(name for name, _ in base.model.named_modules() if name in found)


def is_in(name: str, modules: Iterable[str]) -> bool:
    """Whether a name is that of one of the modules, or of a part of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def auto_class(task: str) -> str:
    """The name of transformers' class that loads models for a task."""
    return tasks.with_hub_name(task).auto_class


def load_pretrained(
    task: str, source: str, revision: str | None, classes: Sequence[str], kind: str | None = None
) -> nn.Module:
    """A pretrained model in float32, by the source that a configuration would name.

    A head that the checkpoint lacks has random weights, which an adapter replaces.

    Args:
        task: the task, in the hub's words.
        source: ``model.source``.
        revision: ``model.revision``.
        classes: names of the model's outputs.
        kind: ``task.kind``; the hub's words decide unless given.

    Raises ``ConfigError`` if the source is wrong, as `fedsmoothlora.modeling.loading.model_files`.
    """
    settings = ModelSettings(source=source, revision=revision)
    chosen = tasks.find(kind) if kind in tasks.names() else tasks.with_hub_name(task)
    return chosen().load_model(settings, classes, seed=0).model


def _flat(names: Iterable[Any]) -> set[str]:
    """Names of classes; some models have several for one task."""
    return {one for name in names for one in ([name] if isinstance(name, str) else name)}
