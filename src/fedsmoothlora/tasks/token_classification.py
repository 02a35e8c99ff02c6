"""Token classification: entities, parts of speech, and other tags of words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from fedsmoothlora.errors import ConfigError, DataError
from fedsmoothlora.printable import counted
from fedsmoothlora.tasks.base import ReadRequest, Task, check_installed

if TYPE_CHECKING:
    from pathlib import Path

    from fedsmoothlora.data.examples import Batch, Examples
    from fedsmoothlora.data.loading import Data
    from fedsmoothlora.data.texts import Texts
    from fedsmoothlora.data.tokens import TaggedWords
    from fedsmoothlora.modeling.settings import ModelSettings
    from fedsmoothlora.modeling.text import TextModel
    from fedsmoothlora.tasks.metrics import Measurement
    from fedsmoothlora.tasks.objectives import TokenClassification as Objective


@dataclass(frozen=True, kw_only=True)
class TokenClassification(Task):
    """Tag the words of a text, for instance as entities.

    A row holds a list of words and a list of their tags, of the same length, or is a sentence of a CoNLL
    file. The loss is taken at the first token of each word. The tags are ``data.classes``, those that the
    data set declares, or those of the training rows. Tags such as ``B-PER``, ``I-PER`` and ``O`` mark
    entities, and are also measured by whole entities (``entity_f1``); for other tags, set
    ``checkpoint.best = "token_accuracy"``.

    Attributes:
        kind: ``token-classification``.
        tokens_column: column of the words; ``tokens`` in a CoNLL file.
        tags_column: column of the tags; ``tags`` in a CoNLL file.
        max_length: largest number of tokens of a row. A longer row loses its last words; such rows are
            counted and reported.
    """

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "lora.target_modules": ["all-linear"],
            "training.batch_size": 16,
            "training.optimizer": "adamw",
            "training.lr": 0.001,
            "evaluation.batch_size": 64,
            "checkpoint.best": "entity_f1",
        }
    )
    hub_name: ClassVar[str] = "token-classification"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    auto_mapping: ClassVar[str] = "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"
    metrics: ClassVar[tuple[str, ...]] = (
        *("entity_f1", "entity_precision", "entity_recall"),
        *("token_accuracy", "loss"),
    )
    classifies: ClassVar[bool] = False
    weighs_labels: ClassVar[bool] = True
    unused_keys: ClassVar[tuple[str, ...]] = (
        *("model.image_size", "data.image_column", "data.audio_column"),
        "data.verify",
    )

    kind: Literal["token-classification"] = "token-classification"
    tokens_column: str = "tokens"
    tags_column: str = "tags"
    max_length: Annotated[int, Ge(2)] = 256

    @property
    def units_per_row(self) -> int:
        """Metrics are means over words."""
        return self.max_length

    def read(self, request: ReadRequest) -> TokenData:
        """The data of a run: words with their tags."""
        return TokenData(self, request)

    def load_model(
        self, model: ModelSettings, classes: Sequence[str], seed: int, *, empty: bool = False
    ) -> TextModel:
        """The pretrained model with a head for the tags."""
        from fedsmoothlora.modeling.text import load_token_classifier

        return load_token_classifier(model, classes, seed, empty=empty)

    def write_processor(self, model: ModelSettings, folder: Path) -> None:
        """``AutoTokenizer.from_pretrained(folder)`` is the run's tokenizer."""
        from fedsmoothlora.modeling.text import load_word_tokenizer

        load_word_tokenizer(model).save_pretrained(folder)


class TokenData:
    """Words with their tags.

    Raises ``ConfigError`` or ``DataError`` if data, tags or tokenizer are not valid.
    """

    def __init__(self, task: TokenClassification, request: ReadRequest) -> None:
        from fedsmoothlora.modeling.text import check_length, load_word_tokenizer

        self._task, self._model, self._seed = task, request.model, request.seed
        check_length(request.model, task.max_length)
        self.data = self._read(request)
        self._number = {name: number for number, name in enumerate(self.data.outputs)}
        self._tokenizer = load_word_tokenizer(request.model)
        self._notes = list(self.data.notes)
        self.train = self._encoded(self.data.train, "training")
        self.test = None if self.data.test is None else self._encoded(self.data.test, "test")

    def examples(self, rows: Texts) -> Examples:
        """Words as tokens, with the numbers of their tags."""
        return self._encoded(rows, "other")

    def load(self, *, empty: bool = False) -> TextModel:
        """The pretrained model with a head for the tags of the data."""
        from fedsmoothlora.modeling.text import check_tokens

        loaded = self._task.load_model(self._model, self.data.outputs, self._seed, empty=empty)
        if empty:
            rows = chain(self.train.ids, () if self.test is None else self.test.ids)
            check_tokens(self._model, loaded.model, self._tokenizer, rows, self._task.max_length)
        return loaded

    def objective(self, loaded: Any) -> Objective:
        """Cross-entropy of the words' tags, with metrics of entities."""
        from fedsmoothlora.tasks.objectives import TokenClassification

        return TokenClassification(self.data.outputs)

    def measurement(self, rows: Texts, batch_size: int) -> Measurement | None:
        """None: there is no costly metric."""
        return None

    def notes(self) -> list[str]:
        """Notes of the reader, and the numbers of rows and words that were cut."""
        return self._notes

    def facts(self) -> list[str]:
        """The tags, and the numbers of tokens of the rows."""
        from fedsmoothlora.data.prompts import length_facts
        from fedsmoothlora.printable import printable

        tags = f"{len(self._number)} tags: {', '.join(map(printable, self._number))}"
        return [tags, length_facts(self.train.lengths, "training")]

    def widest_batch(self, rows: int) -> Batch:
        """Rows as long as the longest, or as ``max_length`` without rows."""
        import torch

        # Without a mask, because there is no padding.
        shape = (rows, max(self.train.lengths, default=self._task.max_length))
        return {
            "input_ids": torch.empty(shape, dtype=torch.int64, device="meta"),
            "labels": torch.empty(shape, dtype=torch.int64, device="meta"),
        }

    def _read(self, request: ReadRequest) -> Data[Texts]:
        from fedsmoothlora.data.duplicates import similar_class_notes
        from fedsmoothlora.data.text_sources import load_texts
        from fedsmoothlora.data.texts import sorted_names
        from fedsmoothlora.tasks.objectives.token_classification import has_entities

        settings, task = request.data, self._task
        tags = settings.classes
        if request.elsewhere and not tags:
            raise ConfigError(
                "data.classes is missing: if sites hold the data, it must name the tags in their order"
            )
        if task.tokens_column == task.tags_column:
            raise ConfigError(f"task.tokens_column and task.tags_column are both {task.tags_column!r}")
        data = load_texts(
            replace(settings, classes=()),
            request.seed,
            {},
            None if request.elsewhere else settings.label_column,
            request.client_column,
            lists={task.tokens_column: "task.tokens_column", task.tags_column: "task.tags_column"},
            targets=[task.tags_column],
            elsewhere=request.elsewhere,
        )
        for texts in (data.train, data.test):
            self._check_tags(texts)
        tags = tags or data.declared.get(task.tags_column, ())
        tags = tags or sorted_names(tag for row in data.train.lists[task.tags_column] for tag in row)
        if len(tags) < 2:
            raise ConfigError(
                f"data.source = {settings.source!r}, column {task.tags_column!r} has {len(tags)} different "
                "tags; should be two or more"
            )
        notes = [*data.notes, *similar_class_notes(tags)]
        if has_entities(tags):
            check_installed(["seqeval"], "task.kind = 'token-classification'")
        else:
            notes.append(
                "the tags do not mark entities, which O and tags such as B-PER, I-PER, E-PER and S-PER do: "
                "entity_f1 is not measured, and token_accuracy is (checkpoint.best = 'token_accuracy')"
            )
        return replace(data, label_names=tuple(tags), notes=notes)

    def _check_tags(self, texts: Texts | None) -> None:
        """Raise ``DataError`` with its place for a blank tag, which would be a tag of its own."""
        tags, words = self._task.tags_column, self._task.tokens_column
        for row, found in enumerate(() if texts is None else texts.lists[tags]):
            blank = next((number for number, tag in enumerate(found) if not tag.strip()), None)
            if texts is not None and blank is not None:
                word = "".join(texts.lists[words][row][blank : blank + 1])
                raise DataError(
                    f"{texts.place(row)}, column {tags!r}: the tag of word {blank + 1}, {word!r}, is "
                    "missing; every word needs one, such as O for a word outside of entities"
                )

    def _encoded(self, texts: Texts, what: str) -> TaggedWords:
        from fedsmoothlora.data.tokens import TaggedWords
        from fedsmoothlora.modeling.text import pad_token

        pad = pad_token(self._tokenizer)
        words = texts.lists[self._task.tokens_column]
        tags = [self._numbers(texts, row) for row in range(len(texts))]
        if not words:
            return TaggedWords([], [], pad)
        longest = self._task.max_length
        encoded = self._tokenizer(
            list(map(list, words)), is_split_into_words=True, truncation=True, max_length=longest
        )
        labels, lost_rows, lost_words = [], 0, 0
        for row, own in enumerate(tags):
            aligned, tagged = at_first_tokens(encoded.word_ids(row), own)
            if not tagged:
                raise DataError(f"{texts.place(row)}: none of its words has a token")
            labels.append(aligned)
            lost_rows, lost_words = lost_rows + (tagged < len(own)), lost_words + len(own) - tagged
        if lost_rows:
            self._notes.append(
                f"{lost_rows} of {len(texts)} {what} rows lose {counted(lost_words, 'word')}. Lost words are "
                "neither read nor counted in metrics: rows end after task.max_length = "
                f"{longest} tokens, and some characters, such as control characters, have no tokens"
            )
        return TaggedWords(encoded["input_ids"], labels, pad)

    def _numbers(self, texts: Texts, row: int) -> list[int]:
        """The numbers of a row's tags. Raises ``DataError`` with its place for tags that do not fit."""
        task = self._task
        words, tags = texts.lists[task.tokens_column][row], texts.lists[task.tags_column][row]
        if len(words) != len(tags):
            raise DataError(
                f"{texts.place(row)}: {len(words)} words ({task.tokens_column!r}) and {len(tags)} tags "
                f"({task.tags_column!r}); every word needs one tag"
            )
        if not words:
            raise DataError(f"{texts.place(row)}, column {task.tokens_column!r}: there are no words")
        if unknown := [tag for tag in tags if tag not in self._number]:
            raise DataError(
                f"{texts.place(row)}, column {task.tags_column!r}: there is no tag {unknown[0]!r}; the tags "
                f"are {', '.join(self._number)}"
            )
        return [self._number[tag] for tag in tags]


def at_first_tokens(words: Sequence[int | None], tags: Sequence[int]) -> tuple[list[int], int]:
    """The tag of each word at its first token, and the number of words that have a token.

    Args:
        words: the word that each token belongs to, counted from 0; None for special tokens.
        tags: the tag of each word.

    Returns:
        For each token the tag, or -100, and the number of tagged words.
    """
    from fedsmoothlora.data.tokens import IGNORED

    found, seen = [], set()
    for word in words:
        is_first = word is not None and word not in seen
        found.append(tags[word] if word is not None and is_first else IGNORED)
        seen |= {word} if is_first else set()
    return found, len(seen)
