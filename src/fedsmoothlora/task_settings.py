"""The keys of ``[task]``, and the defaults that a task has for keys of other sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge

from fedsmoothlora.errors import ConfigError

KindName = Literal["image-classification", "text-classification", "causal-lm"]

# By task.kind: the values of keys that a configuration does not set, by dotted key.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "image-classification": {},
    "text-classification": {
        "task.prompt": "{text}",
        "task.max_length": 256,
        "lora.target_modules": ["all-linear"],
        "training.batch_size": 16,
        "evaluation.batch_size": 64,
    },
    "causal-lm": {
        "task.prompt": "{prompt}",
        "task.answer": "{answer}",
        "task.chat": False,
        "task.max_length": 512,
        "model.head": "lora",
        "lora.target_modules": ["all-linear"],
        "training.batch_size": 8,
        "training.optimizer": "adamw",
        "training.lr": 0.0003,
        "training.max_grad_norm": 1.0,
        "evaluation.batch_size": 16,
        "checkpoint.best": "loss",
    },
}


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """The keys of ``[task]``.

    Attributes:
        kind: the task: ``image-classification``, ``text-classification`` or ``causal-lm`` (language
            modelling).
        prompt: template of the model's input text, with columns of the data in braces, such as ``Question:
            {question}``; unless set, ``{text}`` for classification and ``{prompt}`` for a language model.
        answer: template of the text that a language model learns to write after the prompt; ``{answer}``
            unless set. An end-of-sequence token is added. The loss is taken on the answer only.
        chat: write prompt and answer as turns of the tokenizer's chat template.
        system: system message of the chat. Needs ``chat``.
        max_length: largest number of tokens of a row. A longer row loses the beginning of its prompt; the end
            of its answer is cut only if the answer alone is too long. Both are counted and reported.
        frozen_features: evaluate the model below its head once for each row, without dropout, and keep the
            resulting vector in the cache folder, so that a run takes seconds. Only the head can be adapted
            then. ``head`` keeps the vector that the model passes to its head. ``mean`` keeps the mean of the
            last layer's tokens, as sentence encoders use it; transformers has no such classifier, so no model
            is saved.
        metric: additional, costly metric. ``exact-match`` generates answers and compares their numbers, or
            their words if the reference has no number. ``multiple-choice`` picks the most likely of the
            options.
        metric_rows: number of test rows on which the metric is measured, drawn by the run's seed.
        metric_every: measure the metric after every so many rounds; 0 measures it only before the first round
            and after the last.
        max_new_tokens: largest number of tokens of a generated answer.
        marker: text that introduces the result in a reference or a generated answer, such as ``The answer
            is:`` in worked solutions; only the text after its last occurrence is compared.
        options_column: column of a question's options, one per line or as a list. The answer is one of them.
    """

    kind: KindName = "image-classification"
    prompt: str | None = None
    answer: str | None = None
    chat: bool | None = None
    system: str | None = None
    max_length: Annotated[int, Ge(2)] | None = None
    frozen_features: Literal["head", "mean"] | None = None
    metric: Literal["exact-match", "multiple-choice"] | None = None
    metric_rows: Annotated[int, Ge(1)] | None = None
    metric_every: Annotated[int, Ge(0)] | None = None
    max_new_tokens: Annotated[int, Ge(1)] | None = None
    marker: str | None = None
    options_column: str | None = None

    def check(self) -> None:
        """Raise ``ConfigError`` for a key that this kind or this metric has no use for."""
        for part in fields(self):
            if part.name in ("kind", "metric") or getattr(self, part.name) is None:
                continue
            if self.kind not in _KINDS_OF[part.name]:
                kinds = " or ".join(map(repr, _KINDS_OF[part.name]))
                raise ConfigError(f"{part.name} belongs to task.kind = {kinds}, not {self.kind!r}")
            metrics = _METRICS_OF.get(part.name)
            if metrics is not None and self.metric not in metrics:
                raise ConfigError(f"{part.name} belongs to task.metric = {' or '.join(map(repr, metrics))}")
        if self.metric is not None and self.kind != "causal-lm":
            raise ConfigError(
                f"metric = {self.metric!r} belongs to task.kind = 'causal-lm', not {self.kind!r}"
            )
        if self.metric == "multiple-choice" and self.options_column is None:
            raise ConfigError("options_column is missing: task.metric = 'multiple-choice' needs it")
        if self.system is not None and not self.chat:
            raise ConfigError("system belongs to task.chat = true")


def why_not_saved(task: TaskSettings) -> str | None:
    """Why no model of transformers computes what was trained; None where one does."""
    if task.frozen_features != "mean":
        return None
    return (
        "task.frozen_features = 'mean': transformers has no classifier on the mean of the tokens, so no "
        "model is written; 'head' trains one that can be"
    )


_LANGUAGE = ("causal-lm",)
_TEXTS = ("text-classification", *_LANGUAGE)
_KINDS_OF: Mapping[str, Sequence[str]] = {
    "prompt": _TEXTS,
    "max_length": _TEXTS,
    "frozen_features": ("text-classification",),
    **dict.fromkeys(
        ("answer", "chat", "system", "metric_rows", "metric_every", "max_new_tokens", "marker"), _LANGUAGE
    ),
    "options_column": _LANGUAGE,
}
_BOTH = ("exact-match", "multiple-choice")
_METRICS_OF: Mapping[str, Sequence[str]] = {
    "metric_rows": _BOTH,
    "metric_every": _BOTH,
    "max_new_tokens": ["exact-match"],
    "marker": ["exact-match"],
    "options_column": ["multiple-choice"],
}
