"""Generate text with a trained language model, with prompts in the form that they had in training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedsmoothlora.data.chat_template import ChatTemplate
from fedsmoothlora.data.chats import ASSISTANT, SYSTEM, USER, Message, without_first_exchange
from fedsmoothlora.data.prompts import Speaker, Template
from fedsmoothlora.errors import GenerationError
from fedsmoothlora.exports.base import load_pretrained
from fedsmoothlora.exports.loading import FACTS, load_adapter, read_facts, readable
from fedsmoothlora.exports.merged import merge
from fedsmoothlora.exports.run_model import load_run_model, open_run
from fedsmoothlora.exports.trained import global_model
from fedsmoothlora.logs import quiet_libraries
from fedsmoothlora.modeling.text import load_tokenizer
from fedsmoothlora.training.devices import resolved

_TASK = "text-generation"


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """The form of prompts in training.

    Attributes:
        template: text with columns in braces, ``Question: {question}``.
        chat: whether a prompt is a turn of the tokenizer's chat template.
        system: template of the chat's system message.
    """

    template: str = "{prompt}"
    chat: bool = False
    system: str | None = None

    def tokens(self, tokenizer: Any, prompt: str) -> list[int]:
        """The tokens of a prompt, after which the model generates.

        Args:
            tokenizer: the tokenizer of the model.
            prompt: a JSON object with the value of each of the template's columns. If there is only one
                column, or only space between the columns, any text, which replaces all of them.

        Raises ``GenerationError`` if the template needs several columns and they are not given, or if the
        text is not Unicode.
        """
        text, system = self._filled(prompt)
        _check_unicode(text, system or "")
        (tokens,) = Speaker(tokenizer, self.chat).prompts([text], None if system is None else [system])
        return tokens

    def turn(self, text: str) -> str:
        """A user's turn of a chat: in the template, if the runs' prompts were turns of chats."""
        return self._filled(text)[0] if self.chat else text

    def _filled(self, prompt: str) -> tuple[str, str | None]:
        """The text of the prompt, and of the system message if there is one."""
        template = Template(self.template, "the run's prompt")
        system = None if self.system is None else Template(self.system, "the run's system message")
        columns = dict.fromkeys((*template.columns, *(system.columns if system else ())))
        try:
            row = json.loads(prompt)
        except ValueError:
            row = None
        if isinstance(row, dict) and columns and row.keys() == columns.keys():
            values = {name: str(value) for name, value in row.items()}
            return template.fill(values), None if system is None else system.fill(values)
        spot = template.spot
        if spot is None or (system and system.columns):
            example = json.dumps(dict.fromkeys(columns, "..."))
            raise GenerationError(
                f"the run's prompts have the columns {', '.join(columns)}: give them as JSON, '{example}'"
            )
        before, after = spot
        return before + prompt + after, None if system is None else system.fill({})


@dataclass(frozen=True)
class Writer:
    """A trained language model with its tokenizer.

    Attributes:
        model: the trained model.
        tokenizer: its tokenizer.
        prompting: the form of prompts in training.
    """

    model: nn.Module
    tokenizer: Any
    prompting: Prompting

    def write(
        self, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """Generate text after a prompt.

        Args:
            prompt: the value of the template's only column, or a JSON object with a value for each column.
            max_new_tokens: the largest number of generated tokens.
            temperature: 0 takes the most likely token each time; with a higher one, tokens are drawn.
            seed: seed of the draws.

        Raises:
            GenerationError: a number is out of range, the prompt is too long for the model, or the template
                needs other columns.
        """
        _check_options(max_new_tokens, temperature)
        tokens = self.prompting.tokens(self.tokenizer, prompt)
        if not tokens:
            raise GenerationError("the prompt is empty: the model needs at least one token to go on from")
        most = self.positions
        if most is not None and len(tokens) + max_new_tokens > most:
            raise GenerationError(
                f"the prompt has {len(tokens)} tokens, and the model takes {most} with those that it writes: "
                + (f"ask for at most {most - len(tokens)} new ones" if len(tokens) < most else "shorten it")
            )
        ends = self._turn_ends if self.prompting.chat and self.tokenizer.is_fast else ()
        return self._generated(tokens, max_new_tokens, temperature, seed, ends)

    def reply(
        self, chat: Sequence[Message], *, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> str:
        """Generate the assistant's next turn of a chat.

        A chat that leaves no room for the answer loses its oldest exchanges; a system turn stays.

        Args:
            chat: messages with ``role`` and ``content``; the last is not the assistant's.
            max_new_tokens, temperature, seed: as in `write`.

        Raises:
            GenerationError: a number is out of range, a turn is not Unicode, or the last turn alone is too
                long for the model.
            ConfigError, DataError: the tokenizer has no chat template, or it does not take the chat.
        """
        _check_options(max_new_tokens, temperature)
        _check_unicode(*(str(message["content"]) for message in chat))
        template = ChatTemplate(self.tokenizer)
        left, most = list(chat), self.positions
        while True:
            tokens = template.prompt(template.fitting(left), "the chat")
            if most is None or len(tokens) + max_new_tokens <= most:
                return self._generated(tokens, max_new_tokens, temperature, seed, self._turn_ends).strip()
            shorter = without_first_exchange(left)
            if shorter == left:
                raise GenerationError(
                    f"the last turn has {len(tokens)} tokens, and the model takes {most} with those that it "
                    "writes: shorten it"
                )
            left = shorter

    @property
    def positions(self) -> int | None:
        """The largest number of tokens that the model takes, if it is limited."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @cached_property
    def _turn_ends(self) -> list[int]:
        """The tokens that end a turn of the assistant: the model's own, and those of the chat template."""
        own: Any = self.model.generation_config.eos_token_id  # type: ignore[union-attr]
        of_model = own if isinstance(own, list) else [] if own is None else [own]
        return list(dict.fromkeys([*of_model, *ChatTemplate(self.tokenizer).ends]))

    @torch.inference_mode()
    def _generated(
        self,
        tokens: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        ends: Sequence[int] = (),
    ) -> str:
        """The text that the model writes after these tokens, up to one of ``ends`` or its own end."""
        options: dict[str, Any] = (
            {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        )
        if ends:
            options["eos_token_id"] = list(ends)
        pad = self.tokenizer.pad_token_id
        inputs = torch.tensor([list(tokens)], device=next(self.model.parameters()).device)
        generate: Any = self.model.generate
        with torch.random.fork_rng(), quiet_libraries():
            torch.manual_seed(seed)
            found = generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                **options,
            )
        text: str = self.tokenizer.decode(found[0, len(tokens) :], skip_special_tokens=True)
        return text


@dataclass
class Conversation:
    """A chat with a model.

    Attributes:
        writer: the model.
        options: ``max_new_tokens``, ``temperature`` and ``seed`` of `Writer.reply`.
        messages: the turns so far.

    Raises:
        GenerationError: the tokenizer has no chat template, or the run's system message has columns.
    """

    writer: Writer
    options: Mapping[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.writer.tokenizer.chat_template:
            raise GenerationError(
                "--chat needs a tokenizer with a chat template, and the model's has none: generate without "
                "--chat, or train with task.chat_template"
            )
        system = self.writer.prompting.system
        if system is not None and not self.messages:
            template = Template(system, "the run's system message")
            if template.columns:
                raise GenerationError(
                    f"the run's system message {system!r} has columns, so a chat has none: generate without "
                    "--chat, and give the columns as JSON"
                )
            self.messages.append({"role": SYSTEM, "content": template.fill({})})

    def say(self, text: str) -> str:
        """Add a user's turn, and return the assistant's."""
        asked = self.writer.prompting.turn(text)
        answer = self.writer.reply([*self.messages, {"role": USER, "content": asked}], **self.options)
        self.messages += [{"role": USER, "content": asked}, {"role": ASSISTANT, "content": answer}]
        return answer


def load_writer(folder: str | Path, *, device: str = "auto") -> Writer:
    """Load the language model in the folder of a run (its newest checkpoint) or of an export.

    Args:
        folder: the folder.
        device: the device that computes, as `machine.device`.

    Raises:
        GenerationError: it is no causal language model.
        ConfigError: this machine has no such device.
        ExportError, NoExportError: the folder is neither a run's nor an export's, or no round is finished.
        StateError: the base weights or the configuration have changed since the run began.
        NotKeptError: the method has no global model.
        WrongBaseError: an adapter's base model has other weights.
    """
    folder, place = Path(folder), resolved(device, "device")
    with quiet_libraries():
        writer = _from_export(folder) if (folder / FACTS).is_file() else _from_run(folder)
    writer.model.to(place).eval()
    return writer


def load_base_writer(folder: str | Path, *, device: str = "auto") -> Writer | None:
    """The model that a run or an export was trained from, with the same tokenizer and form of prompts.

    None if it has no name. Raises as `load_writer`.
    """
    folder, place = Path(folder), resolved(device, "device")
    with quiet_libraries():
        writer = _base_of_export(folder) if (folder / FACTS).is_file() else _from_run(folder, trained=False)
    if writer is not None:
        writer.model.to(place).eval()
    return writer


def generate(
    folder: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Generate text with the model of a run or an export; see `load_writer` and `Writer.write`."""
    return load_writer(folder, device=device).write(
        prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )


def _check_options(max_new_tokens: int, temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature >= 0) or max_new_tokens < 1:
        raise GenerationError(
            f"temperature = {temperature}, max_new_tokens = {max_new_tokens}: should be at least 0 and 1"
        )


def _check_unicode(*texts: str) -> None:
    """Raise ``GenerationError`` for half of a character, as which Python reads a byte that is not UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise GenerationError(
                f"the prompt is not UTF-8 text: {text[error.start]!r} at character {error.start + 1}"
            ) from None


def _from_export(folder: Path) -> Writer:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    facts = read_facts(folder)
    _check_task(facts["task"], folder, exported=True)
    model: nn.Module
    if facts["as"] == "merged":
        with readable(folder):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    else:
        model = load_adapter(folder)
    with readable(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return Writer(model, tokenizer, Prompting(**facts["prompt"] or {}))


def _base_of_export(folder: Path) -> Writer | None:
    from transformers import AutoTokenizer

    facts = read_facts(folder)
    _check_task(facts["task"], folder, exported=True)
    base = facts["base"]
    if base["source"] is None:
        return None
    model = load_pretrained(facts["task"], base["source"], base["revision"], facts["classes"])
    with readable(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return Writer(model, tokenizer, Prompting(**facts["prompt"] or {}))


def _from_run(folder: Path, *, trained: bool = True) -> Writer:
    run_model = load_run_model(open_run(folder), lambda note: None)
    _check_task(run_model.task, folder, exported=False)
    base = run_model.base()
    if trained:
        merge(global_model(run_model.server), base.model)
    template = getattr(run_model.config.task, "chat_template", None)
    tokenizer = load_tokenizer(run_model.config.model, template)
    return Writer(base.model, tokenizer, Prompting(**run_model.prompt or {}))


def _check_task(task: str | None, folder: Path, *, exported: bool) -> None:
    if task == _TASK:
        return
    where, first = folder, ""
    if not exported:
        where, first = Path("DIR"), f"fedsmoothlora export {folder} --as merged --out DIR, then "
    raise GenerationError(
        f"the model in {folder} is for {task or 'something else'}: only causal language models write text. "
        f"To use it: {first}transformers.pipeline({task!r}, model={str(where)!r})"
    )
