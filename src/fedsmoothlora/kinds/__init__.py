"""The kinds of task: images, documents, language. One file each holds all that is particular to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fedsmoothlora.kinds import documents, images, language
from fedsmoothlora.kinds.interface import Kind, Loaded
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.task_settings import KindName

__all__ = [
    "KINDS",
    "Kind",
    "load_model",
    "write_processor",
]

# Called with [model], [data], [task], the run's seed, the column that names clients (or None) and, by name,
# whether the training rows are held ``elsewhere``, at sites.
KINDS: dict[str, Callable[..., Kind]] = {
    "image-classification": images.ImageClassification,
    "text-classification": documents.TextClassification,
    "causal-lm": language.LanguageModelling,
}

_MODULES: dict[str, Any] = {
    "image-classification": images,
    "text-classification": documents,
    "causal-lm": language,
}


def load_model(
    kind: KindName, model: ModelSettings, classes: Sequence[str], seed: int, *, empty: bool = False
) -> Loaded:
    """The pretrained model as a run of that kind loads it, from its settings alone: the data is not read.

    Args:
        kind: of task.
        model: ``[model]``.
        classes: of the data, in the order of their labels.
        seed: of the run.
        empty: on the meta device, without weights.
    """
    loaded: Loaded = _MODULES[kind].load_model(model, classes, seed, empty=empty)
    return loaded


def write_processor(kind: KindName, model: ModelSettings, folder: Path) -> None:
    """Write what prepares a model's inputs, as transformers does: image processor or tokenizer."""
    _MODULES[kind].write_processor(model, folder)
