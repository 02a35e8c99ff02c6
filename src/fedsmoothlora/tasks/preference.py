"""Preferences between two answers: direct preference optimisation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt

from fedsmoothlora.errors import ConfigError, DataError
from fedsmoothlora.tasks.base import ReadRequest, Task

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from fedsmoothlora.data.chat_template import EncodedChat
    from fedsmoothlora.data.chats import Chat
    from fedsmoothlora.data.examples import Batch
    from fedsmoothlora.data.loading import Data
    from fedsmoothlora.data.texts import Texts
    from fedsmoothlora.data.tokens import Pairs
    from fedsmoothlora.modeling.settings import ModelSettings
    from fedsmoothlora.modeling.text import TextModel
    from fedsmoothlora.tasks.metrics import Measurement
    from fedsmoothlora.tasks.objectives import DirectPreference

_log = logging.getLogger(__name__)

_PROMPT = "{prompt}"
_BATCH = 16  # answers in a batch of the reference model
_FILE, _KEY = "reference.safetensors", "reference"


@dataclass(frozen=True, kw_only=True)
class Preference(Task):
    """Prefer one of two answers: direct preference optimisation (DPO, arXiv 2305.18290).

    The reference model is the pretrained model, without LoRA and without updates. It stays the same in all
    rounds, also for methods that merge updates into the weights, so the loss always measures the distance
    from the pretrained model. Its log-probabilities are computed once before round 0 and kept, in the cache
    folder too. So the reference costs no memory and no time in training.

    Attributes:
        kind: ``preference``.
        prompt: template of the prompt, with columns of the data in braces.
        chosen: template of the preferred answer. If the column holds a chat, a list of messages with ``role``
            and ``content``, its last turn is the answer and the turns before it are the prompt.
        rejected: template of the other answer, in the same form.
        chat: write prompt and answers as turns of the tokenizer's chat template; always so for chats.
        system: template of the chat's system message. Needs ``chat``.
        chat_template: template of chats in Jinja, in place of the tokenizer's own, which base models lack.
            Exports contain it.
        max_length: largest number of tokens of a prompt with an answer. A longer one loses the beginning of
            its prompt; the end of the answer is cut only if the answer alone is too long. Both answers to a
            prompt lose the same tokens of it, as many as the longer one. Cuts are counted and reported.
        beta: the strength with which the model is held to the reference model.
    """

    metrics: ClassVar[tuple[str, ...]] = ("preference_accuracy", "loss", "reward_margin")
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {
            "model.head": "lora",
            "lora.target_modules": ["all-linear"],
            "training.batch_size": 8,
            "training.optimizer": "adamw",
            "training.lr": 0.00005,
            "training.max_grad_norm": 1.0,
            "evaluation.batch_size": 8,
            "checkpoint.best": "loss",
        }
    )
    hub_name: ClassVar[str] = "text-generation"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    auto_mapping: ClassVar[str] = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    classifies: ClassVar[bool] = False
    unused_keys: ClassVar[tuple[str, ...]] = (
        *("model.image_size", "data.image_column", "data.audio_column"),
        "data.verify",
    )

    kind: Literal["preference"] = "preference"
    prompt: str = _PROMPT
    chosen: str = "{chosen}"
    rejected: str = "{rejected}"
    chat: bool = False
    system: str | None = None
    chat_template: str | None = None
    max_length: Annotated[int, Ge(2)] = 512
    beta: Annotated[float, Gt(0)] = 0.1

    def check(self) -> None:
        """Raise ``ConfigError`` for a system message without a chat."""
        if self.system is not None and not self.chat:
            raise ConfigError("system belongs to task.chat = true")

    def read(self, request: ReadRequest) -> PreferenceData:
        """The data of a run: prompts with two answers each."""
        return PreferenceData(self, request)

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
    def prompt_format(self) -> dict[str, Any]:
        """The templates, and whether the prompt is a turn of a chat."""
        return {"template": self.prompt, "chat": self.chat, "system": self.system}

    def prompt_format_of(self, form: str | None) -> dict[str, Any]:
        """The templates; for chats, a turn of the user."""
        return {**self.prompt_format, "chat": True} if form == "chat" else self.prompt_format


class PreferenceData:
    """Prompts with a chosen and a rejected answer each.

    Raises ``ConfigError`` or ``DataError`` if data, templates or tokenizer are not valid.
    """

    def __init__(self, task: Preference, request: ReadRequest) -> None:
        from fedsmoothlora.data.chats import SYSTEM_COLUMN, TOOLS_COLUMN
        from fedsmoothlora.data.prompts import Speaker, Template
        from fedsmoothlora.modeling.text import check_length, load_tokenizer

        model, data = request.model, request.data
        if model.head == "full":
            raise ConfigError("model.head = 'full': a language model's head is not trained; leave it out")
        self._task, self._model, self._seed, self._longest = task, model, request.seed, task.max_length
        check_length(model, task.max_length)
        self._prompt: Template | None = Template(task.prompt, "task.prompt")
        self._chosen = Template(task.chosen, "task.chosen")
        self._rejected = Template(task.rejected, "task.rejected")
        self._system = None if task.system is None else Template(task.system, "task.system")
        if not self._chosen.columns or not self._rejected.columns:
            raise ConfigError("task.chosen and task.rejected: each should name a column")
        columns = self._columns(request)
        if task.prompt == _PROMPT and not request.elsewhere and columns and "prompt" not in columns:
            self._prompt = None  # chats contain their prompts
        wanted = {
            column: template.key
            for template in (self._prompt, self._chosen, self._rejected, self._system)
            if template is not None
            for column in template.columns
        }
        self.data = self._loaded(request, wanted)
        self._are_chats = self._hold_chats()
        if self._are_chats and TOOLS_COLUMN in columns:
            wanted.setdefault(TOOLS_COLUMN, "beside the chats of data.source")
            self.data = self._loaded(request, wanted)
        if self._are_chats:
            self.data = replace(self.data, form="chat")
        elif self._prompt is None:
            raise ConfigError(
                f"{data.source} has no column 'prompt' (task.prompt), and its answers are no chats with the "
                "prompt in them; set task.prompt"
            )
        tokenizer = load_tokenizer(model, task.chat_template)
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"model.source = {model.source!r}: its tokenizer has no end of sequence")
        if task.chat and not tokenizer.chat_template:
            raise ConfigError(f"task.chat = true: the tokenizer of {model.source!r} has no chat template")
        self._tokenizer = tokenizer
        self._speaker = Speaker(tokenizer, task.chat)
        self._notes = list(self.data.notes)
        if self._are_chats:
            self._notes.append(
                f"{data.source}: the answers are chats, written by the tokenizer's chat template; the last "
                "turn is the answer"
            )
        if SYSTEM_COLUMN in columns and SYSTEM_COLUMN not in wanted:
            self._notes.append(
                f"{data.source}: column {SYSTEM_COLUMN!r} is not read; name it in task.system, with "
                "task.chat = true, or in task.prompt"
            )
        self.train = self._encoded(self.data.train, "training")
        self.test = None if self.data.test is None else self._encoded(self.data.test, "test")

    def load(self, *, empty: bool = False) -> TextModel:
        """The pretrained model."""
        from fedsmoothlora.modeling.text import check_tokens

        loaded = self._task.load_model(self._model, self.data.classes, self._seed, empty=empty)
        if empty:
            sets = [pairs.answers for pairs in self._sets]
            rows = (answers.row(row)[0] for answers in sets for row in range(len(answers)))
            check_tokens(self._model, loaded.model, self._tokenizer, rows, self._longest)
        return loaded

    def prepare(self, model: nn.Module, to_device: Callable[[Batch], Batch]) -> None:
        """Compute the log-probabilities of all answers by the reference model, or read them."""
        for pairs in self._sets:
            if len(pairs):
                pairs.reference = kept_reference(model, pairs, to_device)

    def objective(self, loaded: Any) -> DirectPreference:
        """The loss of direct preference optimisation."""
        from fedsmoothlora.tasks.objectives import DirectPreference

        return DirectPreference(self._task.beta)

    def measurement(self, rows: Texts, batch_size: int) -> Measurement | None:
        """There is none."""
        return None

    def examples(self, rows: Texts) -> Pairs:
        """Prompts and answers as tokens, without the reference."""
        return self._encoded(rows, "other")

    def notes(self) -> list[str]:
        """Notes of the reader, and the numbers of rows that were cut."""
        return self._notes

    def facts(self) -> list[str]:
        """Numbers of tokens of prompts with an answer."""
        from fedsmoothlora.data.prompts import length_facts

        return [length_facts(self.train.answers.lengths, "training", "prompts with an answer")]

    def widest_batch(self, rows: int) -> Batch:
        """Pairs of answers as long as the longest; the limit where no rows are here."""
        import torch

        answers = self.train.answers
        width = max(answers.lengths, default=self._longest)
        labels = (answers.batch([row])["labels"].shape[1] for row in range(len(answers)))
        return {
            "input_ids": torch.empty((2 * rows, width), dtype=torch.int64, device="meta"),
            # The mask that transformers makes of a mask by row. It would need values for that.
            "attention_mask": torch.empty((2 * rows, 1, width, width), device="meta"),
            "position_ids": torch.empty((1, width), dtype=torch.int64, device="meta"),
            "labels": torch.empty((2 * rows, max(labels, default=width)), dtype=torch.int64, device="meta"),
            "reference": torch.empty((2 * rows,), device="meta"),
        }

    @property
    def _sets(self) -> list[Pairs]:
        return [self.train] if self.test is None else [self.train, self.test]

    def _loaded(self, request: ReadRequest, wanted: Mapping[str, str]) -> Data[Texts]:
        """The columns that are wanted, each with the key that names it."""
        from fedsmoothlora.data.text_sources import load_texts

        return load_texts(
            request.data,
            request.seed,
            wanted,
            request.data.label_column,
            request.client_column,
            json=tuple(wanted),
            elsewhere=request.elsewhere,
        )

    def _columns(self, request: ReadRequest) -> tuple[str, ...]:
        """The columns of the training data, or of the test data if sites hold the training data."""
        from fedsmoothlora.data.text_sources import text_columns

        data = request.data
        if not request.elsewhere:
            return text_columns(data)
        return () if data.test is None else text_columns(replace(data, source=data.test, path=None))

    def _hold_chats(self) -> bool:
        """Whether the first row's answers are chats."""
        from fedsmoothlora.data.chats import is_chat

        for texts in (self.data.train, self.data.test):
            if texts is not None and len(texts):
                return is_chat(self._chosen.fill(texts.row(0)))
        return False

    def _encoded(self, texts: Texts, what: str) -> Pairs:
        """Prompts and answers as tokens, both prompts of a pair cut alike."""
        from fedsmoothlora.data.prompts import cut_note, fit
        from fedsmoothlora.data.tokens import Completions, Pairs
        from fedsmoothlora.modeling.text import pad_token

        prompts, answers = self._chats(texts, what) if self._are_chats else self._answers(texts)
        before, after, cut = fit(prompts, answers, self._longest, same_prompt=2)
        self._notes += cut_note(cut, len(after), self._longest, f"{what} prompts with an answer as")
        whole, equal = (sum(map(list.__eq__, rows[::2], rows[1::2])) for rows in (answers, after))
        if equal:
            self._notes.append(
                f"{equal} of {len(texts)} {what} pairs have two equal answers, from which nothing is learned"
                + (f"; {equal - whole} of them only because they are cut" if equal > whole else "")
            )
        return Pairs(Completions(before, after, pad_token(self._tokenizer)))

    def _answers(self, texts: Texts) -> tuple[list[list[int]], list[list[int]]]:
        """The tokens of every prompt, twice, and of its two answers."""
        from fedsmoothlora.data.prompts import filled

        assert self._prompt is not None
        prompts, chosen, rejected = (filled(texts, t) for t in (self._prompt, self._chosen, self._rejected))
        self._refuse_chats(texts, chosen, rejected)
        systems = None if self._system is None else filled(texts, self._system)
        before = self._speaker.prompts(prompts, systems)
        sides = [self._speaker.answers(prompts, answers, systems) for answers in (chosen, rejected)]
        answers = [answer for pair in zip(*sides, strict=True) for answer in pair]
        return [prompt for prompt in before for _ in range(2)], answers

    def _refuse_chats(self, texts: Texts, chosen: Sequence[str], rejected: Sequence[str]) -> None:
        """Raise ``DataError`` for an answer that is a chat: its JSON would be learned as a text."""
        from fedsmoothlora.data.chats import has_turns

        for number, answers in enumerate(zip(chosen, rejected, strict=True)):
            if any(map(has_turns, answers)):
                raise DataError(
                    f"{texts.place(number)}: an answer is a chat, and the chosen answer of the first row is "
                    "a text; all answers should have the same form"
                )

    def _chats(self, texts: Texts, what: str) -> tuple[list[list[int]], list[list[int]]]:
        """The tokens of both chats of every row before their last turn, and of these turns."""
        from fedsmoothlora.data.chat_rows import unmarked_notes, unread_tools_note
        from fedsmoothlora.data.chat_template import ChatTemplate, last_answer
        from fedsmoothlora.data.chats import TOOLS_COLUMN, parsed_tools

        template, unread = ChatTemplate(self._tokenizer), 0
        rows: list[EncodedChat] = []
        for number in range(len(texts)):
            place, row = texts.place(number), texts.row(number)
            tools = parsed_tools(row.get(TOOLS_COLUMN, ""), f"{place}, column {TOOLS_COLUMN!r}")
            for chat in map(template.fitting, self._pair(row, place)):
                rows.append(last_answer(template.encoded(chat, place, tools)))
                unread += template.leaves_out(tools, chat)
        self._notes += [*unread_tools_note(unread, len(rows), what), *unmarked_notes(rows, what)]
        starts = [row.taught.index(True) for row in rows]
        return (
            [row.ids[:start] for row, start in zip(rows, starts, strict=True)],
            [row.ids[start:] for row, start in zip(rows, starts, strict=True)],
        )

    def _pair(self, row: Mapping[str, str], place: str) -> tuple[Chat, Chat]:
        """Both chats of a row, which differ in their last turn only."""
        from fedsmoothlora.data.chats import ASSISTANT, SYSTEM, is_chat, parsed, parsed_messages

        prompt: Chat = []
        if self._prompt is not None and is_chat(text := self._prompt.fill(row)):
            prompt = parsed_messages(text, f"{place}, task.prompt")
        sides = []
        for template in (self._chosen, self._rejected):
            chat = parsed(template.fill(row), f"{place}, {template.key}")
            chat = chat if chat[: len(prompt)] == prompt else [*prompt, *chat]
            if self._system is not None and chat[0]["role"] != SYSTEM:
                chat = [{"role": SYSTEM, "content": self._system.fill(row)}, *chat]
            sides.append(chat)
        chosen, rejected = sides
        if chosen[:-1] != rejected[:-1] or {chosen[-1]["role"], rejected[-1]["role"]} != {ASSISTANT}:
            raise DataError(
                f"{place}: the chosen and the rejected chat should be the same but for their last turn, "
                "which is the assistant's"
            )
        if len(chosen) < 2:
            raise DataError(f"{place}: there is no turn before the answers")
        return chosen, rejected


def kept_reference(model: nn.Module, pairs: Pairs, to_device: Callable[[Batch], Batch]) -> Tensor:
    """The log-probability of every answer by the reference model: read from the cache, or stored there.

    The cache key is a hash of the model's weights and of the tokens and labels of all answers.

    Args:
        model: the pretrained model, with LoRA disabled.
        pairs: the pairs.
        to_device: moves a batch to the device of the model.

    Raises ``OSError`` if the cache folder cannot be written.
    """
    import hashlib

    import numpy as np
    from safetensors.torch import load_file, save_file

    from fedsmoothlora.data.packages import cached
    from fedsmoothlora.modeling.fingerprint import weights_sha256
    from fedsmoothlora.tasks.objectives.preference import answer_likelihoods

    digest = hashlib.sha256(weights_sha256(model).encode())
    digest.update(str(next(model.parameters()).dtype).encode())
    for row in range(len(pairs.answers)):
        for values in pairs.answers.row(row):
            digest.update(np.array([len(values), *values], dtype=np.int64).data)

    def build(folder: Path) -> None:
        _log.info(
            "computing the log-probabilities of %d answers by the reference model, once", len(pairs.answers)
        )
        found = answer_likelihoods(model, pairs.answers, _BATCH, to_device)
        save_file({_KEY: found}, folder / _FILE)

    folder = cached(f"references/{digest.hexdigest()[:32]}", build, private=True)
    return load_file(folder / _FILE)[_KEY]
