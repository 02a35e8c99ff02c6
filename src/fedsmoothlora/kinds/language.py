"""Causal language models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedsmoothlora.data.examples import Batch
from fedsmoothlora.data.prompts import Speaker, Template, cut_note, filled, fit, length_facts
from fedsmoothlora.data.settings import DataSettings
from fedsmoothlora.data.sources import load_texts
from fedsmoothlora.data.texts import Texts
from fedsmoothlora.data.tokens import Completions
from fedsmoothlora.errors import ConfigError, DataError
from fedsmoothlora.modeling.settings import ModelSettings
from fedsmoothlora.models.text import (
    TextModel,
    check_length,
    load_causal_language_model,
    load_tokenizer,
    pad_token,
)
from fedsmoothlora.seeds import seed_for
from fedsmoothlora.task_settings import TaskSettings
from fedsmoothlora.tasks import CausalLanguageModel, Measurement
from fedsmoothlora.tasks.exact_match import ExactMatch
from fedsmoothlora.tasks.interface import Times
from fedsmoothlora.tasks.multiple_choice import MultipleChoice

_METRIC_ROWS = 100
_NEW_TOKENS = 64


def load_model(model: ModelSettings, classes: Sequence[str], seed: int, *, empty: bool = False) -> TextModel:
    """The pretrained model; whatever classes rows have, and nothing of it is drawn."""
    return load_causal_language_model(model, empty=empty)


def write_processor(model: ModelSettings, folder: Path) -> None:
    """``AutoTokenizer.from_pretrained(folder)`` is the run's tokenizer."""
    load_tokenizer(model).save_pretrained(folder)


class LanguageModelling:
    """Prompts and the answers to be learned.

    Raises ``ConfigError`` or ``DataError`` where data, templates or source cannot be right.
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
        assert task.answer is not None
        assert task.max_length is not None
        if model.head == "full":
            raise ConfigError("model.head = 'full': a language model's head is not trained; leave it out")
        self._model, self._settings, self._seed, self._longest = model, task, seed, task.max_length
        check_length(model, task.max_length)
        self._prompt, self._answer = (
            Template(task.prompt, "task.prompt"),
            Template(task.answer, "task.answer"),
        )
        if not self._answer.columns:
            raise ConfigError(f"task.answer = {task.answer!r} names no column: there is nothing to learn")
        if task.options_column is not None and len(self._answer.columns) != 1:
            raise ConfigError(
                f"task.answer = {task.answer!r}: multiple choice puts each option in place of the answer's "
                "column, so there must be one only"
            )
        self.data = load_texts(
            data, seed, self._wanted(), data.label_column, client_column, elsewhere=elsewhere
        )
        tokenizer = load_tokenizer(model)
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"model.source = {model.source!r}: its tokenizer has no end of sequence")
        if task.chat and not tokenizer.chat_template:
            raise ConfigError(f"task.chat = true: the tokenizer of {model.source!r} has no chat template")
        self._tokenizer = tokenizer
        self._speaker = Speaker(tokenizer, bool(task.chat), task.system)
        self._notes = list(self.data.notes)
        self.train = self._encoded(self.data.train, "training")
        self.test = None if self.data.test is None else self._encoded(self.data.test, "test")
        for part in (self.data.train, self.data.test):
            if task.options_column is not None and part is not None:
                self._check_options(part)

    def load(self, *, empty: bool = False) -> TextModel:
        """The pretrained model."""
        return load_model(self._model, self.data.classes, self._seed, empty=empty)

    def task(self, loaded: Any) -> CausalLanguageModel:
        """Loss and perplexity of the answers."""
        return CausalLanguageModel()

    def measurement(self, rows: Texts, batch_size: int) -> Measurement | None:
        """Exact match or multiple choice, on rows drawn by the run's seed."""
        settings = self._settings
        if settings.metric is None:
            return None
        wanted = min(settings.metric_rows or _METRIC_ROWS, len(rows))
        drawn = np.random.default_rng(seed_for(self._seed, "metric rows")).permutation(len(rows))[:wanted]
        chosen, times = rows.take(np.sort(drawn)), Times(settings.metric_every or 0)
        if settings.metric == "multiple-choice":
            return self._multiple_choice(chosen, batch_size, times)
        longest = self._longest - 1
        return ExactMatch(
            prompts=[ids[-longest:] for ids in self._speaker.prompts(filled(chosen, self._prompt))],
            references=filled(chosen, self._answer),
            tokenizer=self._tokenizer,
            batch_size=batch_size,
            max_new_tokens=settings.max_new_tokens or _NEW_TOKENS,
            marker=settings.marker,
            times=times,
        )

    def notes(self) -> list[str]:
        """What was noticed while reading, and how many rows were cut."""
        return self._notes

    def facts(self) -> list[str]:
        """Tokens of the rows."""
        answers = [len(ids) for ids in self.train.answers]
        return [length_facts(self.train.lengths, "training"), length_facts(answers, "training", "answers")]

    def widest_batch(self, rows: int) -> Batch:
        """The longest row and the longest answer, so many times."""
        width = max(self.train.lengths)
        answer = max(len(ids) for ids in self.train.answers)
        return {
            "input_ids": torch.empty((rows, width), dtype=torch.int64, device="meta"),
            # The mask that transformers would make of a mask by row, for which it has to look at values.
            "attention_mask": torch.empty((rows, 1, width, width), device="meta"),
            "position_ids": torch.empty((1, width), dtype=torch.int64, device="meta"),
            "labels": torch.empty((rows, answer), dtype=torch.int64, device="meta"),
        }

    def _wanted(self) -> dict[str, str]:
        """The columns that the settings name, and the key of each."""
        wanted = dict.fromkeys(self._prompt.columns, "task.prompt")
        wanted |= dict.fromkeys(self._answer.columns, "task.answer")
        if self._settings.options_column is not None:
            wanted[self._settings.options_column] = "task.options_column"
        return wanted

    def _encoded(self, texts: Texts, what: str) -> Completions:
        prompts, answers = filled(texts, self._prompt), filled(texts, self._answer)
        encoded, cut = self._completions(prompts, answers)
        self._notes += cut_note(cut, len(texts), self._longest, what)
        return encoded

    def _completions(self, prompts: Sequence[str], answers: Sequence[str]) -> tuple[Completions, Any]:
        before, after, cut = fit(
            self._speaker.prompts(prompts), self._speaker.answers(prompts, answers), self._longest
        )
        return Completions(before, after, pad_token(self._tokenizer)), cut

    def _multiple_choice(self, rows: Texts, batch_size: int, times: Times) -> MultipleChoice:
        (column,) = self._answer.columns
        prompts, answers, counts, right = [], [], [], []
        for prompt, row in zip(filled(rows, self._prompt), map(rows.row, range(len(rows))), strict=True):
            options = self._options(row)
            prompts += [prompt] * len(options)
            answers += [self._answer.fill({**row, column: option}) for option in options]
            counts.append(len(options))
            right.append(options.index(row[column].strip()))
        completions, _ = self._completions(prompts, answers)
        return MultipleChoice(
            options=completions, counts=counts, right=right, batch_size=batch_size, times=times
        )

    def _options(self, row: dict[str, str]) -> list[str]:
        lines = row[str(self._settings.options_column)].split("\n")
        return [line.strip() for line in lines if line.strip()]

    def _check_options(self, rows: Texts) -> None:
        (column,) = self._answer.columns
        for number in range(len(rows)):
            row = rows.row(number)
            options = self._options(row)
            if len(options) < 2:
                raise DataError(
                    f"{rows.place(number)}, column {self._settings.options_column!r}: {len(options)} "
                    "options; should be two or more, one a line"
                )
            if row[column].strip() not in options:
                raise DataError(
                    f"{rows.place(number)}, column {column!r}: the answer {row[column]!r} is none of the "
                    f"options {options}"
                )
