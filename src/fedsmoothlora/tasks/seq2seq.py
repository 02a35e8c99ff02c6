"""Sequence to sequence: texts from texts, by models with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.tasks.base import ReadRequest, Task, check_installed

if TYPE_CHECKING:
    from pathlib import Path

    from fedsmoothlora.data.examples import Batch, Examples
    from fedsmoothlora.data.texts import Texts
    from fedsmoothlora.data.tokens import Translations
    from fedsmoothlora.modeling.settings import ModelSettings
    from fedsmoothlora.modeling.text import TextModel
    from fedsmoothlora.tasks.metrics import Measurement
    from fedsmoothlora.tasks.objectives import SequenceToSequence

_METRIC_ROWS = 100

# The package that a score needs.
_PACKAGES: Mapping[str, str] = {"rouge": "rouge_score", "bleu": "sacrebleu"}
_METRICS: Mapping[str, tuple[str, ...]] = {
    "rouge": ("rougeL", "rouge1", "rouge2"),
    "bleu": ("bleu",),
    "exact-match": ("exact_match",),
}


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(Task):
    """Write texts from texts with T5, BART and their like: summaries, translations, answers.

    Attributes:
        kind: ``seq2seq``.
        prompt: template of the encoder's text, with columns of the data in braces, such as ``summarize:
            {document}``; ``{{`` and ``}}`` are braces.
        answer: template of the text that the decoder learns to write.
        max_length: largest number of tokens of the encoder's text. A longer one loses its end.
        max_answer_length: largest number of tokens of an answer, in training and in generation. A longer one
            loses its end. Rows that are cut are counted and reported.
        scores: costly metrics of generated answers: ``rouge`` (ROUGE-1, ROUGE-2, ROUGE-L), ``bleu`` and
            ``exact-match``.
        metric_rows: number of test rows whose answers are generated, drawn by the run's seed.
        metric_every: generate answers after every so many rounds; 0 does so only before the first round and
            after the last.
    """

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "model.head": "lora",
            "lora.target_modules": ["all-linear"],
            "training.batch_size": 8,
            "training.optimizer": "adamw",
            "training.lr": 0.0005,
            "training.max_grad_norm": 1.0,
            "evaluation.batch_size": 16,
            "checkpoint.best": "loss",
        }
    )
    hub_name: ClassVar[str] = "text2text-generation"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    auto_mapping: ClassVar[str] = "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"
    metrics: ClassVar[tuple[str, ...]] = (
        *("rougeL", "rouge1", "rouge2", "bleu", "exact_match"),
        *("loss", "perplexity"),
    )
    classifies: ClassVar[bool] = False
    unused_keys: ClassVar[tuple[str, ...]] = (
        *("model.image_size", "data.image_column", "data.audio_column"),
        "data.verify",
    )

    kind: Literal["seq2seq"] = "seq2seq"
    prompt: str = "{prompt}"
    answer: str = "{answer}"
    max_length: Annotated[int, Ge(2)] = 512
    max_answer_length: Annotated[int, Ge(2)] = 128
    scores: tuple[Literal["rouge", "bleu", "exact-match"], ...] = ()
    metric_rows: Annotated[int, Ge(1)] | None = None
    metric_every: Annotated[int, Ge(0)] | None = None

    def check(self) -> None:
        """Raise ``ConfigError`` for keys of generation without scores, and for scores without a package."""
        for key in ("metric_rows", "metric_every"):
            if getattr(self, key) is not None and not self.scores:
                raise ConfigError(f"{key} belongs to task.scores, which names no score of generated answers")
        check_installed([_PACKAGES[name] for name in self.scores if name in _PACKAGES], "scores")

    def read(self, request: ReadRequest) -> Seq2SeqData:
        """The data of a run: inputs and answers."""
        return Seq2SeqData(self, request)

    def load_model(
        self, model: ModelSettings, classes: Sequence[str], seed: int, *, empty: bool = False
    ) -> TextModel:
        """The pretrained model. It has no classes, and none of its weights are drawn."""
        from fedsmoothlora.modeling.text import load_sequence_to_sequence_model

        return load_sequence_to_sequence_model(model, empty=empty)

    def write_processor(self, model: ModelSettings, folder: Path) -> None:
        """``AutoTokenizer.from_pretrained(folder)`` is the run's tokenizer."""
        from fedsmoothlora.modeling.text import load_tokenizer

        load_tokenizer(model).save_pretrained(folder)

    @property
    def measured(self) -> tuple[str, ...]:
        """The metrics without the scores that are not configured."""
        return (*self.costly, "loss", "perplexity")

    @property
    def costly(self) -> tuple[str, ...]:
        """The metrics of the scores."""
        return tuple(name for score in self.scores for name in _METRICS[score])

    @property
    def units_per_row(self) -> int:
        """Metrics are means over tokens."""
        return self.max_answer_length

    @property
    def prompt_format(self) -> dict[str, Any]:
        """The template of the encoder's text."""
        return {"template": self.prompt, "chat": False, "system": None}


class Seq2SeqData:
    """Inputs and the answers to be learned.

    Raises ``ConfigError`` or ``DataError`` if data, templates or tokenizer are not valid.
    """

    def __init__(self, task: Seq2Seq, request: ReadRequest) -> None:
        from fedsmoothlora.data.prompts import Template
        from fedsmoothlora.data.text_sources import load_texts
        from fedsmoothlora.modeling.text import check_length, load_tokenizer

        model, data = request.model, request.data
        if model.head == "full":
            raise ConfigError("model.head = 'full': a language model's head is not trained; leave it out")
        self._task, self._model, self._seed = task, model, request.seed
        check_length(model, max(task.max_length, task.max_answer_length))
        self._prompt = Template(task.prompt, "task.prompt")
        self._answer = Template(task.answer, "task.answer")
        for template in (self._prompt, self._answer):
            if not template.columns:
                raise ConfigError(
                    f"{template.key} = {template.text!r} names no column: all rows would be the same"
                )
        self.data = load_texts(
            data,
            request.seed,
            {
                column: template.key
                for template in (self._prompt, self._answer)
                for column in template.columns
            },
            data.label_column,
            request.client_column,
            elsewhere=request.elsewhere,
        )
        self._tokenizer = load_tokenizer(model)
        self._notes = list(self.data.notes)
        self.train = self._encoded(self.data.train, "training")
        self.test = None if self.data.test is None else self._encoded(self.data.test, "test")

    def examples(self, rows: Texts) -> Examples:
        """Inputs and answers as tokens."""
        return self._encoded(rows, "other")

    def load(self, *, empty: bool = False) -> TextModel:
        """The pretrained model."""
        from fedsmoothlora.modeling.text import check_tokens

        loaded = self._task.load_model(self._model, self.data.classes, self._seed, empty=empty)
        if empty:
            sets = [self.train] if self.test is None else [self.train, self.test]
            rows = chain.from_iterable((*known.sources, *known.targets) for known in sets)
            check_tokens(self._model, loaded.model, self._tokenizer, rows, self._task.max_length)
        return loaded

    def objective(self, loaded: Any) -> SequenceToSequence:
        """Loss and perplexity of the answers."""
        from fedsmoothlora.tasks.objectives import SequenceToSequence

        return SequenceToSequence()

    def measurement(self, rows: Texts, batch_size: int) -> Measurement | None:
        """Scores of generated answers, on rows drawn by the run's seed."""
        import numpy as np

        from fedsmoothlora.algebra.seeds import seed_for
        from fedsmoothlora.data.prompts import filled
        from fedsmoothlora.tasks.metrics.base import Times
        from fedsmoothlora.tasks.metrics.generated_text import GeneratedText

        task = self._task
        if not task.scores:
            return None
        wanted = min(task.metric_rows or _METRIC_ROWS, len(rows))
        drawn = np.random.default_rng(seed_for(self._seed, "metric rows")).permutation(len(rows))[:wanted]
        chosen = rows.take(np.sort(drawn))
        encoded, _ = self._tokens(chosen)
        return GeneratedText(
            sources=encoded.sources,
            references=filled(chosen, self._answer),
            tokenizer=self._tokenizer,
            pad=encoded.pad,
            batch_size=batch_size,
            max_new_tokens=task.max_answer_length,
            scores=task.scores,
            times=Times(task.metric_every or 0),
        )

    def notes(self) -> list[str]:
        """Notes of the reader, and the numbers of rows that were cut."""
        return self._notes

    def facts(self) -> list[str]:
        """Numbers of tokens of inputs and answers."""
        from fedsmoothlora.data.prompts import length_facts

        answers = [len(ids) for ids in self.train.targets]
        return [
            length_facts(self.train.lengths, "training", "inputs"),
            length_facts(answers, "training", "answers"),
        ]

    def widest_batch(self, rows: int) -> Batch:
        """Inputs and answers as long as the longest, or as the largest lengths without rows."""
        import torch

        # Without a mask, because there is no padding.
        text = max(self.train.lengths, default=self._task.max_length)
        answer = max(map(len, self.train.targets), default=self._task.max_answer_length)
        return {
            "input_ids": torch.empty((rows, text), dtype=torch.int64, device="meta"),
            "labels": torch.empty((rows, answer), dtype=torch.int64, device="meta"),
        }

    def _encoded(self, texts: Texts, what: str) -> Translations:
        encoded, cut = self._tokens(texts)
        for key, count in cut.items():
            if count:
                part = "inputs" if key == "max_length" else "answers"
                self._notes.append(
                    f"{count} of {len(texts)} {what} {part} are longer than task.{key} = "
                    f"{getattr(self._task, key)} tokens: their ends are not read"
                )
        return encoded

    def _tokens(self, texts: Texts) -> tuple[Translations, dict[str, int]]:
        """Tokens of inputs and answers, and the numbers of those that were cut, by the key that cut them."""
        from fedsmoothlora.data.prompts import filled
        from fedsmoothlora.data.tokens import Translations
        from fedsmoothlora.modeling.text import pad_token

        task = self._task
        parts = {"max_length": ("text", self._prompt), "max_answer_length": ("text_target", self._answer)}
        found: list[list[list[int]]] = []
        cut = {}
        for key, (argument, template) in parts.items():
            written, longest = filled(texts, template), getattr(task, key)
            # Answers are the tokenizer's targets: some models mark them with tokens of their own.
            whole = self._tokenizer(**{argument: written}, verbose=False)["input_ids"] if written else []
            too_long = [row for row, ids in enumerate(whole) if len(ids) > longest]
            if too_long and key == "max_length":
                again = {argument: [written[row] for row in too_long]}
                short = self._tokenizer(**again, truncation=True, max_length=longest)["input_ids"]
            else:  # without its end of sequence, which a model would learn to write there
                short = [whole[row][:longest] for row in too_long]
            for row, ids in zip(too_long, short, strict=True):
                whole[row] = ids
            found.append(whole)
            cut[key] = len(too_long)
        sources, targets = found
        return Translations(sources, targets, pad_token(self._tokenizer)), cut
