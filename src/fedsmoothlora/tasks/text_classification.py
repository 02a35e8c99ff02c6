"""Text classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from fedsmoothlora.errors import ConfigError
from fedsmoothlora.tasks.base import ReadRequest, Task

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from fedsmoothlora.data.examples import Batch, Examples, Vectors
    from fedsmoothlora.data.loading import Data
    from fedsmoothlora.data.texts import Texts
    from fedsmoothlora.data.tokens import Documents
    from fedsmoothlora.modeling.features import Pooling
    from fedsmoothlora.modeling.settings import ModelSettings
    from fedsmoothlora.modeling.text import TextModel
    from fedsmoothlora.tasks.metrics import Measurement
    from fedsmoothlora.tasks.objectives import Objective


@dataclass(frozen=True, kw_only=True)
class TextClassification(Task):
    """Classify texts.

    Attributes:
        kind: ``text-classification``.
        prompt: template of the model's input text, with columns of the data in braces, such as ``Question:
            {question}``. Text in braces is the name of a column, letter by letter; ``{{`` and ``}}`` are
            braces.
        text: two columns whose texts form a pair, such as ``["premise", "hypothesis"]``, in place of
            ``prompt``. The tokenizer encodes them in its own form for pairs, with segment ids if the model
            has them.
        max_length: largest number of tokens of a row. A longer row loses its end, and of a pair the longer
            text loses its end first; such rows are counted and reported.
        frozen_features: evaluate the model below its head once for each row, without dropout, and keep the
            resulting vector in the cache folder, so that a run takes seconds. Only the head can be adapted
            then. ``head`` keeps the vector that the model passes to its head. ``mean`` keeps the mean of the
            last layer's tokens, as sentence encoders use it; transformers has no such classifier, so no model
            is saved.
    """

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "lora.target_modules": ["all-linear"],
            "training.batch_size": 16,
            # SGD at the rate of images leaves a pretrained encoder at chance.
            "training.optimizer": "adamw",
            "training.lr": 0.001,
            "evaluation.batch_size": 64,
        }
    )
    hub_name: ClassVar[str] = "text-classification"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    auto_mapping: ClassVar[str] = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "loss", "macro_f1", "mcc", "auroc")
    problem_type: ClassVar[str | None] = "single_label_classification"
    unused_keys: ClassVar[tuple[str, ...]] = (
        *("model.image_size", "data.image_column", "data.audio_column"),
        "data.verify",
    )

    kind: Literal["text-classification"] = "text-classification"
    prompt: str = "{text}"
    text: tuple[str, str] | None = None
    max_length: Annotated[int, Ge(2)] = 256
    frozen_features: Literal["head", "mean"] | None = None

    def check(self) -> None:
        """Raise ``ConfigError`` if both ``prompt`` and ``text`` are set, or a pair is one column twice."""
        if self.text is None:
            return
        if self.prompt != "{text}":
            raise ConfigError(
                f"prompt = {self.prompt!r} and task.text = {list(self.text)}: give one of them; task.prompt "
                "fills a template, and task.text names the two columns of a pair"
            )
        if self.text[0] == self.text[1]:
            raise ConfigError(f"text = {list(self.text)} names one column twice: a pair has two columns")

    def check_layers(self, layers: Sequence[str], head: Sequence[str]) -> None:
        """Refuse layers below the head if its inputs are frozen."""
        below = [name for name in layers if name not in head]
        if self.frozen_features and below:
            raise ConfigError(
                f"lora.target_modules adapts {below[0]}, which task.frozen_features evaluates once and for "
                f"all: adapt the head alone ({', '.join(head)})"
            )

    def read(self, request: ReadRequest) -> TextData:
        """The data of a run: texts with their labels."""
        return TextData(self, request)

    def load_model(
        self, model: ModelSettings, classes: Sequence[str], seed: int, *, empty: bool = False
    ) -> TextModel:
        """The pretrained model with a head for ``classes``."""
        from fedsmoothlora.modeling.text import load_sequence_classifier, load_tokenizer, pad_token

        return load_sequence_classifier(
            model,
            classes,
            pad_token(load_tokenizer(model)),
            seed,
            problem_type=str(self.problem_type),
            empty=empty,
        )

    def write_processor(self, model: ModelSettings, folder: Path) -> None:
        """``AutoTokenizer.from_pretrained(folder)`` is the run's tokenizer."""
        from fedsmoothlora.modeling.text import load_tokenizer

        load_tokenizer(model).save_pretrained(folder)

    @property
    def why_not_saved(self) -> str | None:
        """Transformers has no classifier on the mean of the tokens."""
        if self.frozen_features != "mean":
            return None
        return (
            "task.frozen_features = 'mean': transformers has no classifier on the mean of the tokens, so no "
            "model is written; 'head' trains one that can be"
        )

    @property
    def prompt_format(self) -> dict[str, Any] | None:
        """The template of prompts; None for pairs of texts."""
        if self.text is not None:
            return None
        return {"template": self.prompt, "chat": False, "system": None}


class TextData:
    """Texts with a class each.

    Raises ``ConfigError`` or ``DataError`` if data, template or source are not valid.
    """

    def __init__(self, task: TextClassification, request: ReadRequest) -> None:
        from fedsmoothlora.data.text_inputs import text_input
        from fedsmoothlora.modeling.text import check_length, load_tokenizer, pooler_notes

        model = request.model
        self._task, self._model, self._seed, self._longest = task, model, request.seed, task.max_length
        check_length(model, task.max_length)
        self._input = text_input(task.prompt, task.text)
        self.data = self._read(request)
        self._tokenizer = load_tokenizer(model)
        self._frozen = task.frozen_features
        self._notes = [*self.data.notes, *pooler_notes(model, task.frozen_features)]
        self._documents = self._encoded(self.data.train, "training")
        self.train: Examples = self._documents
        self._test_documents = None if self.data.test is None else self._encoded(self.data.test, "test")
        self.test: Examples | None = self._test_documents

    def examples(self, rows: Texts) -> Examples:
        """Texts as tokens; as the vectors of the pretrained model if features are frozen."""
        documents = self._encoded(rows, "other")
        if self._frozen is None:
            return documents
        return _vectors(
            self._task.load_model(self._model, self.data.outputs, self._seed), documents, self._frozen
        )

    def load(self, *, empty: bool = False) -> TextModel:
        """The pretrained model with a head for the classes of the data.

        With frozen features, the texts are replaced by their vectors once the weights are loaded.
        """
        from fedsmoothlora.modeling.features import linear_head
        from fedsmoothlora.modeling.text import check_tokens

        loaded = self._task.load_model(self._model, self.data.outputs, self._seed, empty=empty)
        if empty:
            rows = chain(
                self._documents.ids, () if self._test_documents is None else self._test_documents.ids
            )
            check_tokens(self._model, loaded.model, self._tokenizer, rows, self._longest)
        if self._frozen:
            linear_head(loaded)
        if self._frozen and not empty:
            self.train = _vectors(loaded, self.train, self._frozen)
            self.test = None if self.test is None else _vectors(loaded, self.test, self._frozen)
        return loaded

    def objective(self, loaded: Any) -> Objective:
        """Cross-entropy, with accuracy and other metrics of classification."""
        from fedsmoothlora.tasks.objectives import Classification

        return Classification(head=self._called_head(loaded), classes=self.data.classes)

    def measurement(self, rows: Texts, batch_size: int) -> Measurement | None:
        """None: there is no costly metric."""
        return None

    def notes(self) -> list[str]:
        """Notes of the reader, and the number of texts that were cut."""
        return self._notes

    def facts(self) -> list[str]:
        """Numbers of tokens of the rows."""
        from fedsmoothlora.data.prompts import length_facts

        return [length_facts(self._documents.lengths, "training")]

    def widest_batch(self, rows: int) -> Batch:
        """Texts as long as the longest, or as ``max_length`` without rows; vectors if features are frozen."""
        import torch

        from fedsmoothlora.modeling.features import linear_head

        own = self._documents.labels
        labels = torch.empty((rows, *own.shape[1:]), dtype=own.dtype, device="meta")
        if self._frozen:
            loaded = self.load(empty=True)
            width = loaded.model.get_submodule(linear_head(loaded)).get_parameter("weight").shape[1]
            return {"inputs": torch.empty(rows, width, device="meta"), "labels": labels}
        shape = (
            rows,
            max(self._documents.lengths, default=self._longest),
        )  # without a mask, because there is no padding
        return {
            "input_ids": torch.empty(shape, dtype=torch.int64, device="meta"),
            "labels": labels,
        }

    def _read(self, request: ReadRequest) -> Data[Texts]:
        """Training and test rows."""
        from fedsmoothlora.data.text_sources import load_texts

        data = load_texts(
            request.data,
            request.seed,
            self._input.wanted,
            request.data.label_column or "label",
            request.client_column,
            elsewhere=request.elsewhere,
        )
        if len(data.classes) < 2:
            raise ConfigError(f"data.source = {request.data.source!r} has no classes to tell apart")
        return data

    def _targets(self, texts: Texts) -> Tensor:
        """The label of every row."""
        import numpy as np
        import torch

        return torch.from_numpy(np.array(texts.labels))

    def _called_head(self, loaded: TextModel) -> str | None:
        """The module that batches are the inputs of; None for the whole model."""
        return loaded.head[0] if self._frozen else None

    def _encoded(self, texts: Texts, what: str) -> Documents:
        from fedsmoothlora.data.tokens import Documents
        from fedsmoothlora.modeling.text import pad_token

        encoded = _tokens(self._model, self._input.texts(texts), self._longest)
        if encoded.cut:
            self._notes.append(
                f"{encoded.cut} of {len(texts)} {what} texts are longer than task.max_length = "
                f"{self._longest} tokens: their ends are not read"
            )
        return Documents(encoded.ids, self._targets(texts), pad_token(self._tokenizer), encoded.segments)


@dataclass(frozen=True)
class _Encoded:
    """Tokens of texts.

    Attributes:
        ids: tokens of every row.
        segments: segment ids of every row; None if texts are no pairs, or if the model has none.
        cut: number of rows that were cut.
    """

    ids: list[list[int]]
    segments: list[list[int]] | None
    cut: int


# Of the training and the test set and their changed copies (`fedsmoothlora attack`), because a comparison
# plans the same texts many times in one process.
@lru_cache(maxsize=4)
def _tokens(
    model: ModelSettings, texts: tuple[str, ...] | tuple[tuple[str, str], ...], longest: int
) -> _Encoded:
    """Tokens of every text or pair, at most ``longest``."""
    from fedsmoothlora.modeling.text import has_segments, load_tokenizer

    tokenizer = load_tokenizer(model)
    if not texts:
        return _Encoded([], None, 0)
    pairs = not isinstance(texts[0], str)
    keys = ["input_ids", *(["token_type_ids"] if pairs and has_segments(model, tokenizer) else [])]
    whole = tokenizer(*_columns(texts), verbose=False)
    found: dict[str, list[list[int]]] = {key: whole[key] for key in keys}
    too_long = [row for row, ids in enumerate(found["input_ids"]) if len(ids) > longest]
    if too_long:
        # The tokenizer's own truncation keeps the special tokens that it puts last. Of a pair, it shortens
        # the longer text first (``longest_first``).
        again = tokenizer(*_columns([texts[row] for row in too_long]), truncation=True, max_length=longest)
        for key in keys:
            for row, short in zip(too_long, again[key], strict=True):
                found[key][row] = short
    return _Encoded(found["input_ids"], found.get("token_type_ids"), len(too_long))


def _columns(texts: Sequence[str | tuple[str, str]]) -> list[list[str]]:
    """One list of texts; of pairs, the list of first texts and that of second texts."""
    pairs = [(text,) if isinstance(text, str) else text for text in texts]
    return [list(column) for column in zip(*pairs, strict=True)]


def _vectors(loaded: TextModel, rows: Examples, pooling: Pooling) -> Vectors:
    """A vector for every text; vectors are returned unchanged."""
    from fedsmoothlora.data.examples import Vectors
    from fedsmoothlora.data.tokens import Documents
    from fedsmoothlora.modeling.features import kept_features

    if isinstance(rows, Vectors):
        return rows
    assert isinstance(rows, Documents)
    return Vectors(kept_features(loaded, rows, pooling), rows.labels)
