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
        kind: what is learned.
        prompt: what the model reads: text with the data's columns in braces, ``Question: {question}``;
            ``{text}`` (classification) or ``{prompt}`` (language model) unless set.
        answer: what a language model learns to write after it; ``{answer}`` unless set. The end of sequence
            is added. The loss is taken on the answer alone.
        chat: write prompt and answer as turns of the tokenizer's chat template.
        system: the chat's system message.
        max_length: the most tokens of a row. The beginning of a longer prompt is left out, the end of an
            answer only where it alone is too long; both are counted and told.
        frozen_features: evaluate the model below its head once a row, without dropout, and keep the vector
            that it comes to (in the cache folder): a run then takes seconds. The head alone can be adapted.
            ``head``: what the model hands to its head. ``mean``: the mean of the last layer's tokens, as
            sentence encoders take it; transformers has no classifier that does so, hence no model is saved.
        metric: a costly one beside the loss. ``exact-match`` generates answers and compares numbers, or words
            where the reference has no number; ``multiple-choice`` takes the likeliest of the options.
        metric_rows: test rows that it is taken on, drawn by the run's seed.
        metric_every: take it after so many rounds each; 0: only before the first round and after the last.
        max_new_tokens: of an answer that is generated.
        marker: in reference and generated answer, only what follows its last occurrence is compared, as
            ``The answer is:`` in worked solutions.
        options_column: the column with a question's options, one a line (or a list); the answer is one of
            them.
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
