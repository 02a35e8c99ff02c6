"""Causal language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from fedsmoothlora.errors import ConfigError, DataError
from fedsmoothlora.tasks.base import ReadRequest, Task

if TYPE_CHECKING:
    from pathlib import Path

    from fedsmoothlora.data.chats import Form
    from fedsmoothlora.data.examples import Batch, Examples
    from fedsmoothlora.data.prompts import Cut, Filling
    from fedsmoothlora.data.texts import Texts
    from fedsmoothlora.data.tokens import Completions, Dialogues, Packed
    from fedsmoothlora.modeling.settings import ModelSettings
    from fedsmoothlora.modeling.text import TextModel
    from fedsmoothlora.tasks.metrics import Measurement, Times
    from fedsmoothlora.tasks.metrics.multiple_choice import MultipleChoice
    from fedsmoothlora.tasks.objectives import CausalLanguageModel

_PROMPT, _ANSWER = "{prompt}", "{answer}"
_METRIC_ROWS = 100
_NEW_TOKENS = 64

# The metrics that use a key.
_BOTH = ("exact-match", "multiple-choice")
_METRICS_OF: Mapping[str, Sequence[str]] = {
    "metric_rows": _BOTH,
    "metric_every": _BOTH,
    "max_new_tokens": ["exact-match"],
    "marker": ["exact-match"],
    "options_column": ["multiple-choice"],
}


@dataclass(frozen=True, kw_only=True)
class CausalLM(Task):
    """Write answers to prompts: language modelling.

    Attributes:
        kind: ``causal-lm``.
        messages: column of chats: a list of messages with ``role`` and ``content``, or ``from`` and ``value``
            (ShareGPT). Needs no ``prompt`` and no ``answer``: the tokenizer's chat template writes the chat,
            and the loss is taken on every turn of the assistant. A chat that is too long loses whole turns at
            its end. Without ``messages``, ``prompt`` and ``answer``, data with a column ``messages`` or
            ``conversations`` are read as chats, and data with ``instruction``, ``output`` and perhaps
            ``input`` as Alpaca's instructions; a note says so. A column ``system`` is the system turn of
            chats that have none, and of instructions with ``chat``.
        prompt: template of the model's input text, with columns of the data in braces, such as ``Question:
            {question}``. In all templates, text in braces is the name of a column, letter by letter, and
            ``{{`` and ``}}`` are braces.
        answer: template of the text that the model learns to write after the prompt. An end-of-sequence token
            is added. The loss is taken on the answer only.
        chat: write prompt and answer as turns of the tokenizer's chat template.
        system: template of the chat's system message. Needs ``chat``. For chats, it is the text of the system
            turn of those that have none, nor a column ``system``, and names no columns.
        chat_template: template of chats in Jinja, in place of the tokenizer's own, which base models lack.
            Exports contain it.
        max_length: largest number of tokens of a row. A longer row loses the beginning of its prompt; the end
            of its answer is cut only if the answer alone is too long. Both are counted and reported.
        packing: put several short rows of a batch into one sequence, which saves padding. No row attends to
            another, positions begin at 0 in every row, and a batch has the same rows and the same loss as
            without packing. Models that cannot keep rows apart are refused.
        metric: additional, costly metric. ``exact-match`` generates answers and compares them with the
            reference: numbers and quantities such as ``9 apples`` by value, everything else as text.
            ``multiple-choice`` picks the most likely of the options.
        metric_rows: number of test rows on which the metric is measured, drawn by the run's seed.
        metric_every: measure the metric after every so many rounds; 0 measures it only before the first round
            and after the last.
        max_new_tokens: largest number of tokens of a generated answer.
        marker: text that introduces the result in a reference or a generated answer, such as ``The answer
            is:`` in worked solutions; only the text after its last occurrence is compared.
        options_column: column of a question's options, one per line or as a list. The answer is one of them.
    """

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "model.head": "lora",
            "lora.target_modules": ["all-linear"],
            "training.batch_size": 8,
            "training.optimizer": "adamw",
            "training.lr": 0.0003,
            "training.max_grad_norm": 1.0,
            "evaluation.batch_size": 16,
            "checkpoint.best": "loss",
        }
    )
    hub_name: ClassVar[str] = "text-generation"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    auto_mapping: ClassVar[str] = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity")
    classifies: ClassVar[bool] = False
    unused_keys: ClassVar[tuple[str, ...]] = (
        *("model.image_size", "data.image_column", "data.audio_column"),
        "data.verify",
    )

    kind: Literal["causal-lm"] = "causal-lm"
    messages: str | None = None
    prompt: str = _PROMPT
    answer: str = _ANSWER
    chat: bool = False
    system: str | None = None
    chat_template: str | None = None
    max_length: Annotated[int, Ge(2)] = 512
    packing: bool = False
    metric: Literal["exact-match", "multiple-choice"] | None = None
    metric_rows: Annotated[int, Ge(1)] | None = None
    metric_every: Annotated[int, Ge(0)] | None = None
    max_new_tokens: Annotated[int, Ge(1)] | None = None
    marker: str | None = None
    options_column: str | None = None

    def check(self) -> None:
        """Raise ``ConfigError`` for a key that the metric does not use, or that needs another key."""
        for key, metrics in _METRICS_OF.items():
            if getattr(self, key) is not None and self.metric not in metrics:
                raise ConfigError(f"{key} belongs to task.metric = {' or '.join(map(repr, metrics))}")
        if self.metric == "multiple-choice" and self.options_column is None:
            raise ConfigError("options_column is missing: task.metric = 'multiple-choice' needs it")
        if self.system is not None and not self.chat and self.messages is None:
            raise ConfigError("system belongs to task.chat = true")
        if self.messages is not None and not self.has_no_templates:
            raise ConfigError("messages: chats need no task.prompt and no task.answer; remove them")
        if self.messages is not None and self.metric == "multiple-choice":
            raise ConfigError("messages: chats have no options; remove task.metric, or set 'exact-match'")

    @property
    def has_no_templates(self) -> bool:
        """Whether neither ``prompt`` nor ``answer`` is set, so that the form of rows is recognised."""
        return (self.prompt, self.answer) == (_PROMPT, _ANSWER)

    def read(self, request: ReadRequest) -> PromptData:
        """The data of a run: prompts and answers."""
        return PromptData(self, request)

    def load_model(
        self, model: ModelSettings, classes: Sequence[str], seed: int, *, empty: bool = False
    ) -> TextModel:
        """The pretrained model. It has no classes, and none of its weights are drawn."""
        from fedsmoothlora.modeling.text import load_causal_language_model

        return load_causal_language_model(model, empty=empty)

    def write_processor(self, model: ModelSettings, folder: Path) -> None:
        """``AutoTokenizer.from_pretrained(folder)`` is the run's tokenizer."""
        from fedsmoothlora.modeling.text import load_tokenizer

        load_tokenizer(model, self.chat_template).save_pretrained(folder)

    @property
    def measured(self) -> tuple[str, ...]:
        """With the costly metric."""
        return (*super().measured, *self.costly)

    @property
    def costly(self) -> tuple[str, ...]:
        """The metric that ``metric`` names."""
        names = {"exact-match": ("exact_match",), "multiple-choice": ("accuracy",)}
        return () if self.metric is None else names[self.metric]

    @property
    def units_per_row(self) -> int:
        """Metrics are means over tokens."""
        return self.max_length

    @property
    def prompt_format(self) -> dict[str, Any]:
        """The templates, and whether the prompt is a turn of a chat."""
        return self.prompt_format_of(None)

    def prompt_format_of(self, form: str | None) -> dict[str, Any]:
        """The templates for rows of a recognised form, and whether the prompt is a turn of a chat."""
        from fedsmoothlora.data.chats import ALPACA_TEMPLATE

        template = self.prompt
        chat = self.chat or self.messages is not None or form == "chat"
        if form == "alpaca":
            template = "{instruction}" if chat else ALPACA_TEMPLATE
        return {"template": template, "chat": chat, "system": self.system}


class PromptData:
    """Prompts and the answers to be learned, or chats.

    Raises ``ConfigError`` or ``DataError`` if data, templates or tokenizer are not valid.
    """

    def __init__(self, task: CausalLM, request: ReadRequest) -> None:
        from fedsmoothlora.data.chat_rows import ChatRows
        from fedsmoothlora.data.chat_template import ChatTemplate
        from fedsmoothlora.data.chats import SYSTEM_COLUMN, TOOLS_COLUMN, AlpacaPrompt
        from fedsmoothlora.data.prompts import Speaker, Template
        from fedsmoothlora.data.text_sources import load_texts
        from fedsmoothlora.modeling.text import check_length, load_tokenizer

        model, data = request.model, request.data
        if model.head == "full":
            raise ConfigError("model.head = 'full': a language model's head is not trained; leave it out")
        self._task, self._model, self._seed, self._longest = task, model, request.seed, task.max_length
        check_length(model, task.max_length)
        self._form = self._form_of(request)
        self._prompt: Filling = Template(task.prompt, "task.prompt")
        self._answer = Template(task.answer, "task.answer")
        self._system = None if task.system is None else Template(task.system, "task.system")
        if self._form is not None and self._form.name == "alpaca":
            self._prompt = AlpacaPrompt(self._form.columns[:-1], task.chat)
            self._answer = Template("{output}" if task.chat else " {output}", "task.answer")
        if not self._answer.columns:
            raise ConfigError(f"task.answer = {task.answer!r} names no column: there is nothing to learn")
        if task.options_column is not None and len(self._answer.columns) != 1:
            raise ConfigError(
                f"task.answer = {task.answer!r}: multiple choice puts each option in place of the answer's "
                "column, so it should name exactly one column"
            )
        is_chat = self._form is not None and self._form.name == "chat"
        if is_chat and (task.options_column is not None or (self._system and self._system.columns)):
            raise ConfigError(
                "the data are chats: task.options_column and columns in task.system belong to task.prompt "
                "and task.answer; remove them"
            )
        self.data = load_texts(
            data,
            request.seed,
            self._wanted(),
            data.label_column,
            request.client_column,
            json=(self._form.column, TOOLS_COLUMN) if self._form is not None and is_chat else (),
            elsewhere=request.elsewhere,
        )
        if self._form is not None:
            self.data = replace(self.data, form=self._form.name)
        tokenizer = load_tokenizer(model, task.chat_template)
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"model.source = {model.source!r}: its tokenizer has no end of sequence")
        if task.chat and not tokenizer.chat_template:
            raise ConfigError(f"task.chat = true: the tokenizer of {model.source!r} has no chat template")
        self._tokenizer = tokenizer
        takes_system = not self._reads_system or not tokenizer.is_fast or ChatTemplate(tokenizer).takes_system
        if not takes_system:
            self._prompt = AlpacaPrompt((*self._prompt.columns, SYSTEM_COLUMN), chat=True)
        self._has_system_turns = self._reads_system and takes_system
        self._speaker = Speaker(tokenizer, task.chat)
        self._chats = (
            ChatRows(
                ChatTemplate(tokenizer),
                self._form,
                self._longest,
                None if self._system is None else self._system.fill({}),
            )
            if self._form is not None and is_chat
            else None
        )
        self._notes = [*self.data.notes, *self._form_note(data.source), *self._column_notes(data.source)]
        self.train = self._encoded(self.data.train, "training")
        self.test = None if self.data.test is None else self._encoded(self.data.test, "test")
        for part in (self.data.train, self.data.test):
            if task.options_column is not None and part is not None:
                self._check_options(part)

    def examples(self, rows: Texts) -> Examples:
        """Prompts and answers as tokens."""
        return self._encoded(rows, "other")

    def load(self, *, empty: bool = False) -> TextModel:
        """The pretrained model."""
        from fedsmoothlora.modeling.packing import check_packing
        from fedsmoothlora.modeling.text import check_tokens

        loaded = self._task.load_model(self._model, self.data.classes, self._seed, empty=empty)
        if self._task.packing:
            check_packing(loaded.model, self._model.source)
        if empty:
            sets = [self.train] if self.test is None else [self.train, self.test]
            rows = chain.from_iterable((known.row(row)[0] for row in range(len(known))) for known in sets)
            check_tokens(self._model, loaded.model, self._tokenizer, rows, self._longest)
        return loaded

    def objective(self, loaded: Any) -> CausalLanguageModel:
        """Loss and perplexity of the answers."""
        from fedsmoothlora.tasks.objectives import CausalLanguageModel

        return CausalLanguageModel()

    def measurement(self, rows: Texts, batch_size: int) -> Measurement | None:
        """Exact match or multiple choice, on rows drawn by the run's seed."""
        import numpy as np

        from fedsmoothlora.algebra.seeds import seed_for
        from fedsmoothlora.data.prompts import filled
        from fedsmoothlora.tasks.metrics.base import Times
        from fedsmoothlora.tasks.metrics.exact_match import ExactMatch

        task = self._task
        if task.metric is None:
            return None
        if self._chats is not None:
            rows = rows.take(np.array(self._chats.with_text(rows), dtype=np.int64))
            if not len(rows):
                raise ConfigError(
                    "task.metric = 'exact-match': no chat to evaluate on ends with a text, so there is "
                    "nothing to compare; remove task.metric"
                )
        wanted = min(task.metric_rows or _METRIC_ROWS, len(rows))
        drawn = np.random.default_rng(seed_for(self._seed, "metric rows")).permutation(len(rows))[:wanted]
        chosen, times = rows.take(np.sort(drawn)), Times(task.metric_every or 0)
        if task.metric == "multiple-choice":
            return self._multiple_choice(chosen, batch_size, times)
        longest = self._longest - 1
        if self._chats is not None:
            prompts, references = self._chats.prompts(chosen)
        else:
            prompts = self._speaker.prompts(filled(chosen, self._prompt), self._systems(chosen))
            references = filled(chosen, self._answer)
        return ExactMatch(
            prompts=[ids[-longest:] for ids in prompts],
            references=references,
            tokenizer=self._tokenizer,
            batch_size=batch_size,
            max_new_tokens=task.max_new_tokens or _NEW_TOKENS,
            marker=task.marker,
            times=times,
        )

    def notes(self) -> list[str]:
        """Notes of the reader, and the numbers of rows that were cut."""
        return self._notes

    def facts(self) -> list[str]:
        """Numbers of tokens of rows and answers, and of turns of chats."""
        from fedsmoothlora.data.prompts import length_facts

        chats = [] if self._chats is None or not len(self.train) else [self._chats.facts(self.data.train)]
        return [
            *chats,
            length_facts(self.train.lengths, "training"),
            length_facts(self._answer_lengths, "training", "answers"),
        ]

    def widest_batch(self, rows: int) -> Batch:
        """Rows and answers as long as the longest; as long as the limit where no rows are here."""
        import torch

        width = max(self.train.lengths, default=self._longest)
        columns = map(self._label_columns, range(len(self.train)))
        # In a packed batch, every column may have a label.
        answer = width if self._task.packing else max(columns, default=width)
        return {
            "input_ids": torch.empty((rows, width), dtype=torch.int64, device="meta"),
            # The mask that transformers makes of a mask by row. It would need values for that.
            "attention_mask": torch.empty((rows, 1, width, width), device="meta"),
            "position_ids": torch.empty((1, width), dtype=torch.int64, device="meta"),
            "labels": torch.empty((rows, answer), dtype=torch.int64, device="meta"),
        }

    @property
    def _answer_lengths(self) -> list[int]:
        """The number of learned tokens of each training row."""
        from fedsmoothlora.data.tokens import IGNORED

        rows = map(self.train.row, range(len(self.train)))
        return [sum(label != IGNORED for label in labels) for _, labels in rows]

    def _label_columns(self, row: int) -> int:
        """The number of columns of a training row from its first learned token on."""
        from fedsmoothlora.data.tokens import IGNORED

        labels = self.train.row(row)[1]
        return len(labels) - next(number for number, label in enumerate(labels) if label != IGNORED)

    def _form_of(self, request: ReadRequest) -> Form | None:
        """The form of the rows: chats or instructions, by ``task.messages`` or by their columns."""
        from fedsmoothlora.data.chats import chat_form, recognised
        from fedsmoothlora.data.text_sources import text_columns

        task, data = self._task, request.data
        if not task.has_no_templates:
            return None
        if request.elsewhere:
            columns = () if data.test is None else text_columns(replace(data, source=data.test, path=None))
        else:
            columns = text_columns(data)
        if task.messages is not None:
            return chat_form(task.messages, columns)
        # Columns of the default templates come first.
        return None if {"prompt", "answer"} <= set(columns) else recognised(columns)

    def _form_note(self, source: str) -> list[str]:
        """A sentence about the form of the rows, if it was recognised by their columns."""
        if self._form is None or self._task.messages is not None:
            return []
        if self._form.name == "chat":
            return [
                f"{source}: rows are chats (column {self._form.column!r}), written by the tokenizer's chat "
                "template; the loss is on every turn of the assistant"
            ]
        how = "as turns of a chat" if self._task.chat else "in the text of Alpaca's prompts"
        return [
            f"{source}: rows are instructions with outputs (columns {', '.join(self._form.columns)}), "
            f"written {how}"
        ]

    def _column_notes(self, source: str) -> list[str]:
        """Sentences about columns of system messages and of earlier turns."""
        from fedsmoothlora.data.chats import HISTORY_COLUMN, SYSTEM_COLUMN

        if self._form is None:
            return []
        uses = dict.fromkeys(
            (name for name in self._form.more if name not in self._wanted()),
            "is not read; it is the system turn with task.chat = true and without task.system",
        )
        if HISTORY_COLUMN in uses:
            uses[HISTORY_COLUMN] = "is not read; earlier turns are read from chats in a column 'messages'"
        if self._reads_system:
            uses[SYSTEM_COLUMN] = (
                "is the system turn" if self._has_system_turns else "is the beginning of the user's turn"
            )
        if SYSTEM_COLUMN in self._form.columns[1:]:
            uses[SYSTEM_COLUMN] = "is the system turn of chats that have none"
        return [f"{source}: column {name!r} {use}" for name, use in uses.items()]

    @property
    def _reads_system(self) -> bool:
        """Whether a column holds the system messages of instructions."""
        from fedsmoothlora.data.chats import SYSTEM_COLUMN

        has_column = self._form is not None and SYSTEM_COLUMN in self._form.more
        return has_column and self._task.chat and self._system is None

    def _wanted(self) -> dict[str, str]:
        """The columns that the settings name, and the key of each."""
        from fedsmoothlora.data.chats import SYSTEM_COLUMN

        if self._form is not None and self._form.name == "chat":
            beside = f"beside {self._form.column!r} in data.source"
            return {**dict.fromkeys(self._form.columns, beside), self._form.column: "task.messages"}
        wanted: dict[str, str] = {}
        templates: list[Filling | None] = [self._prompt, self._answer, self._system]
        for template in filter(None, templates):
            wanted |= dict.fromkeys(template.columns, template.key)
        if self._reads_system:
            wanted[SYSTEM_COLUMN] = "beside 'instruction' in data.source"
        if self._task.options_column is not None:
            wanted[self._task.options_column] = "task.options_column"
        return wanted

    def _encoded(self, texts: Texts, what: str) -> Packed | Completions | Dialogues:
        from fedsmoothlora.data.tokens import Packed

        rows = self._chat_rows(texts, what) if self._chats is not None else self._answer_rows(texts, what)
        return Packed(rows) if self._task.packing else rows

    def _chat_rows(self, texts: Texts, what: str) -> Dialogues:
        from fedsmoothlora.data.tokens import Dialogues
        from fedsmoothlora.modeling.text import pad_token

        assert self._chats is not None
        found, notes = self._chats.encoded(texts, what)
        self._notes += notes
        if self._task.metric == "exact-match":
            self._notes += self._chats.without_text_note(texts, what)
        return Dialogues(
            [row.ids for row in found], [row.taught for row in found], pad_token(self._tokenizer)
        )

    def _answer_rows(self, texts: Texts, what: str) -> Completions:
        from fedsmoothlora.data.prompts import cut_note, filled

        prompts, answers = filled(texts, self._prompt), filled(texts, self._answer)
        encoded, cut = self._completions(prompts, answers, self._systems(texts))
        self._notes += cut_note(cut, len(texts), self._longest, what)
        return encoded

    def _systems(self, texts: Texts) -> Sequence[str | None] | None:
        """The system message of every row that has one."""
        from fedsmoothlora.data.chats import SYSTEM_COLUMN
        from fedsmoothlora.data.prompts import filled

        if self._has_system_turns:
            return [text if text.strip() else None for text in texts.columns[SYSTEM_COLUMN]]
        return None if self._system is None else filled(texts, self._system)

    def _completions(
        self, prompts: Sequence[str], answers: Sequence[str], systems: Sequence[str | None] | None
    ) -> tuple[Completions, Cut]:
        from fedsmoothlora.data.prompts import fit
        from fedsmoothlora.data.tokens import Completions
        from fedsmoothlora.modeling.text import pad_token

        before, after, cut = fit(
            self._speaker.prompts(prompts, systems),
            self._speaker.answers(prompts, answers, systems),
            self._longest,
        )
        return Completions(before, after, pad_token(self._tokenizer)), cut

    def _multiple_choice(self, rows: Texts, batch_size: int, times: Times) -> MultipleChoice:
        import numpy as np

        from fedsmoothlora.data.prompts import filled
        from fedsmoothlora.tasks.metrics.multiple_choice import MultipleChoice

        (column,) = self._answer.columns
        chosen, answers, counts, right = [], [], [], []
        for number in range(len(rows)):
            row = rows.row(number)
            options = self._options(row)
            chosen += [number] * len(options)
            answers += [self._answer.fill({**row, column: option}) for option in options]
            counts.append(len(options))
            right.append(options.index(row[column].strip()))
        repeated = rows.take(np.array(chosen, dtype=np.int64))
        completions, _ = self._completions(filled(repeated, self._prompt), answers, self._systems(repeated))
        return MultipleChoice(
            options=completions, counts=counts, right=right, batch_size=batch_size, times=times
        )

    def _options(self, row: dict[str, str]) -> list[str]:
        lines = row[str(self._task.options_column)].split("\n")
        return [line.strip() for line in lines if line.strip()]

    def _check_options(self, rows: Texts) -> None:
        (column,) = self._answer.columns
        for number in range(len(rows)):
            row = rows.row(number)
            options = self._options(row)
            if len(options) < 2:
                raise DataError(
                    f"{rows.place(number)}, column {self._task.options_column!r}: {len(options)} "
                    "options; should be two or more, one a line"
                )
            if row[column].strip() not in options:
                raise DataError(
                    f"{rows.place(number)}, column {column!r}: the answer {row[column]!r} is none of the "
                    f"options {options}"
                )
