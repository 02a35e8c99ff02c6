"""The kinds of task: images, documents, language. One file each holds all that is particular to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedsmoothlora.kinds import documents, images, language
from fedsmoothlora.kinds.settings import Kind, KindName, TaskSettings

__all__ = ["DEFAULTS", "KINDS", "Kind", "KindName", "TaskSettings"]

# Called with [model], [data], [task], the run's seed and the column that names clients, or None.
KINDS: dict[str, Callable[..., Kind]] = {
    "image-classification": images.ImageClassification,
    "text-classification": documents.TextClassification,
    "causal-lm": language.LanguageModelling,
}

# By kind: what a configuration means where it says nothing, by dotted key.
DEFAULTS: dict[str, dict[str, Any]] = {
    "image-classification": images.DEFAULTS,
    "text-classification": documents.DEFAULTS,
    "causal-lm": language.DEFAULTS,
}
