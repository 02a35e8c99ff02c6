"""Text classification."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsmoothlora.data.examples import Batch, Examples, Vectors
from fedsmoothlora.data.prompts import Template, filled, length_facts
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.data.sources import load_texts
from fedsmoothlora.data.texts import Texts
from fedsmoothlora.data.tokens import Documents
from fedsmoothlora.errors import ConfigError
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.models.features import Pooling, kept_features, linear_head
from fedsmoothlora.models.text import (
    TextModel,
    check_length,
    load_sequence_classifier,
    load_tokenizer,
    pad_token,
)
from fedsmoothlora.task_settings import TaskSettings
from fedsmoothlora.tasks import Classification, Measurement


def load_model(model: ModelSettings, classes: Sequence[str], seed: int, *, empty: bool = False) -> TextModel:
    """The pretrained model with a head for ``classes``; without the data."""
    return load_sequence_classifier(model, classes, pad_token(load_tokenizer(model)), seed, empty=empty)


def write_processor(model: ModelSettings, folder: Path) -> None:
    """``AutoTokenizer.from_pretrained(folder)`` is the run's tokenizer."""
    load_tokenizer(model).save_pretrained(folder)


class TextClassification:
    """Texts, a class each.

    Raises ``ConfigError`` or ``DataError`` where data, template or source cannot be right.
    """

    def __init__(
        self,
        model: ModelSettings,
        data: DataSettings,
        task: TaskSettings,
        seed: int,
        client_column: str | None,
        *,
        elsewhere: bool = False,
    ) -> None:
        assert task.prompt is not None
        assert task.max_length is not None
        self._model, self._seed, self._longest = model, seed, task.max_length
        check_length(model, task.max_length)
        self._template = Template(task.prompt, "task.prompt")
        wanted = dict.fromkeys(self._template.columns, "task.prompt")
        label = data.label_column or "label"
        self.data = load_texts(data, seed, wanted, label, client_column, elsewhere=elsewhere)
        if len(self.data.classes) < 2:
            raise ConfigError(f"data.source = {data.source!r} has no classes to tell apart")
        self._tokenizer = load_tokenizer(model)
        self._frozen = task.frozen_features
        self._notes = list(self.data.notes)
        self._documents = self._encoded(self.data.train, "training")
        self.train: Examples = self._documents
        self.test: Examples | None = None
        if self.data.test is not None:
            self.test = self._encoded(self.data.test, "test")

    def load(self, *, empty: bool = False) -> TextModel:
        """The pretrained model with a head for the data's classes.

        Where its features are frozen they take the place of the texts as the weights are loaded.
        """
        loaded = load_model(self._model, self.data.classes, self._seed, empty=empty)
        if self._frozen:
            linear_head(loaded)
        if self._frozen and not empty:
            self.train = _vectors(loaded, self.train, self._frozen)
            self.test = None if self.test is None else _vectors(loaded, self.test, self._frozen)
        return loaded

    def task(self, loaded: Any) -> Classification:
        """Cross-entropy; accuracy and the like."""
        return Classification(head=loaded.head[0] if self._frozen else None)

    def measurement(self, rows: Texts, batch_size: int) -> Measurement | None:
        """None: all metrics are cheap."""
        return None

    def notes(self) -> list[str]:
        """What was noticed while reading, and how many texts were cut."""
        return self._notes

    def facts(self) -> list[str]:
        """Tokens of the rows."""
        return [length_facts(self._documents.lengths, "training")]

    def widest_batch(self, rows: int) -> Batch:
        """The longest text, so many times; the widest vector, where features are frozen."""
        labels = torch.empty(rows, dtype=torch.int64, device="meta")
        if self._frozen:
            loaded = self.load(empty=True)
            width = loaded.model.get_submodule(linear_head(loaded)).get_parameter("weight").shape[1]
            return {"inputs": torch.empty(rows, width, device="meta"), "labels": labels}
        shape = (rows, max(self._documents.lengths))  # and no mask: there is no padding
        return {
            "input_ids": torch.empty(shape, dtype=torch.int64, device="meta"),
            "labels": labels,
        }

    def _encoded(self, texts: Texts, what: str) -> Documents:
        written = tuple(filled(texts, self._template))
        ids, cut = _tokens(self._model, written, self._longest)
        if cut:
            self._notes.append(
                f"{cut} of {len(texts)} {what} texts are longer than task.max_length = {self._longest} "
                "tokens: their ends are not read"
            )
        labels = torch.from_numpy(np.array(texts.labels))
        return Documents(ids, labels, pad_token(self._tokenizer))


# Training and test set: comparisons plan the same texts in one process many times.
@lru_cache(maxsize=2)
def _tokens(model: ModelSettings, texts: tuple[str, ...], longest: int) -> tuple[list[list[int]], int]:
    """Tokens of every text, ``longest`` at most, and how many texts were cut."""
    tokenizer = load_tokenizer(model)
    ids: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    too_long = [row for row, found in enumerate(ids) if len(found) > longest]
    if too_long:
        # The tokenizer's own truncation keeps the tokens that it puts last.
        again = tokenizer([texts[row] for row in too_long], truncation=True, max_length=longest)["input_ids"]
        for row, found in zip(too_long, again, strict=True):
            ids[row] = found
    return ids, len(too_long)


def _vectors(loaded: TextModel, rows: Examples, pooling: Pooling) -> Vectors:
    """A vector for every text; vectors stay what they are."""
    if isinstance(rows, Vectors):
        return rows
    assert isinstance(rows, Documents)
    return Vectors(kept_features(loaded, rows, pooling), rows.labels)
