"""Prompts and answers: templates over the columns of a row, and their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Protocol

from fedsmoothlora.data.texts import Texts
from fedsmoothlora.errors import ConfigError, DataError

# The messages of a chat, each with its role and content.
Chat = list[dict[str, str]]


@dataclass(frozen=True)
class Template:
    """Text with names of columns in braces, such as ``Question: {question}``.

    All templates of a configuration follow one rule. Text in braces is the exact name of a column: ``{a.b}``
    is the column ``a.b``. Write ``{{`` and ``}}`` for braces that are text. Empty braces ``{}``, formats
    (``{x:>3}``) and conversions (``{x!r}``) are refused. Values are inserted unchanged, so braces in a value
    are text.

    Attributes:
        text: the template.
        key: its key in the configuration, for errors.

    Raises:
        ConfigError: the text does not follow the rule.
    """

    text: str
    key: str

    def __post_init__(self) -> None:
        try:
            parts = list(Formatter().parse(self.text))
        except ValueError as error:
            raise ConfigError(
                f"{self.key} = {self.text!r}: {error}; write {{{{ and }}}} for braces that are text"
            ) from None
        for _, name, form, conversion in parts:
            if name is not None and (not name or form or conversion):
                raise ConfigError(
                    f"{self.key} = {self.text!r}: braces should hold the name of a column and nothing else; "
                    "write {{ and }} for braces that are text"
                )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template names, in order, each once."""
        names = (name for _, name, _, _ in Formatter().parse(self.text) if name is not None)
        return tuple(dict.fromkeys(names))

    @property
    def spot(self) -> tuple[str, str] | None:
        """The text before the first column and after the last.

        None if the template names no column, or if there is text between columns.
        """
        before, after, seen = "", "", False
        for literal, name, _, _ in Formatter().parse(self.text):
            if not seen:
                before += literal
            else:
                after += literal
            if name is not None:
                if after.strip():
                    return None
                seen, after = True, ""
        return (before, after) if seen else None

    def fill(self, row: Mapping[str, str]) -> str:
        """The text with the values of a row inserted."""
        return "".join(
            literal + (row[name] if name is not None else "")
            for literal, name, _, _ in Formatter().parse(self.text)
        )


class Filling(Protocol):
    """A text made of the columns of a row, such as a `Template`."""

    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def key(self) -> str: ...
    def fill(self, row: Mapping[str, str]) -> str: ...


def filled(texts: Texts, template: Filling) -> list[str]:
    """Fill the template with the values of every row.

    Raises ``DataError`` with the place of a row in which all columns of the template are blank.
    """
    found = []
    for number in range(len(texts)):
        row = texts.row(number)
        if template.columns and not any(row[name].strip() for name in template.columns):
            named = ", ".join(repr(name) for name in template.columns)
            columns = (
                f"column {named}: the text is" if len(template.columns) == 1 else f"columns {named}: all"
            )
            raise DataError(
                f"{texts.place(number)}, {columns} empty{'' if len(template.columns) == 1 else ' together'}"
            )
        found.append(template.fill(row))
    return found


@dataclass(frozen=True)
class Speaker:
    """Turns prompts and answers into tokens.

    Without a chat, a row consists of the tokens of the prompt (after any tokens that the tokenizer puts
    first), the tokens of the answer, and the end of sequence. In a chat, the prompt becomes a user's turn and
    the answer an assistant's turn of the tokenizer's chat template. Prompt and answer are tokenized
    separately, so that a prompt has the same tokens in training and before generation.

    Attributes:
        tokenizer: the tokenizer of the model.
        chat: whether to use the tokenizer's chat template.
    """

    tokenizer: Any
    chat: bool = False

    def prompts(self, prompts: Sequence[str], systems: Sequence[str | None] | None = None) -> list[list[int]]:
        """Tokens of prompts, up to the beginning of the answer.

        Args:
            prompts: texts of the prompts.
            systems: system message of each prompt's chat, None for a chat without one; the chat template's
                own unless given.

        Raises ``ConfigError`` if the chat template refuses or ignores a message.
        """
        if self.chat:
            messages = _opened(prompts, systems)
            given = zip(messages, systems or [], strict=False)
            if first := next((chat for chat, system in given if system and system.strip()), None):
                self._check_system(first)
            return self._tokens([self._written(chat) for chat in messages])
        found: list[list[int]] = self.tokenizer(list(prompts))["input_ids"] if prompts else []
        end, begin = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        # Some tokenizers append an end of sequence to every text, but the answer follows the prompt.
        kept = [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in found]
        # The first token of an answer to an empty prompt is predicted from the beginning of the sequence.
        return [ids or ([begin] if begin is not None else []) for ids in kept]

    def answers(
        self, prompts: Sequence[str], answers: Sequence[str], systems: Sequence[str | None] | None = None
    ) -> list[list[int]]:
        """Tokens of answers, each with its end of sequence.

        Args:
            prompts: texts of the prompts.
            answers: text of each prompt's answer.
            systems: as in `prompts`.

        Raises ``ConfigError`` if the chat template refuses a message, or if it writes the prompt differently
        when an answer follows.
        """
        end = self.tokenizer.eos_token_id
        if not self.chat:
            return [[*ids, end] for ids in self._tokens(answers)]
        turns = []
        for chat, answer in zip(_opened(prompts, systems), answers, strict=True):
            before = self._written(chat)
            whole = self._written([*chat, {"role": "assistant", "content": answer}])
            if not whole.startswith(before):
                raise ConfigError(
                    f"task.chat = true: {self._template} writes the prompt differently when an answer "
                    "follows; set task.chat = false and write the chat in task.prompt"
                )
            turns.append(whole[len(before) :])
        found = []
        for ids in self._tokens(turns):
            # Text that a template writes after the end of a turn is not part of the answer.
            last = len(ids) - ids[::-1].index(end) if end in ids else None
            found.append(ids[:last] if last is not None else [*ids, end])
        return found

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def _check_system(self, messages: Chat) -> None:
        """Raise ``ConfigError`` if the template refuses the system message or leaves it out."""
        try:
            without = self._rendered(messages[1:])
        except Exception:  # the template needs a system message
            return
        try:
            why = "leaves it out" if self._rendered(messages) == without else None
        except Exception as error:
            why = f"refuses it: {error}"
        if why is not None:
            raise ConfigError(
                f"task.system = {messages[0]['content']!r}: {self._template} {why}; leave task.system "
                "out, and put its text at the beginning of task.prompt"
            )

    def _written(self, messages: Chat) -> str:
        try:
            return self._rendered(messages)
        except Exception as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(
                f"task.chat = true: {self._template} fails on a chat of the turns {roles}: {error}; set "
                "task.chat = false and write the chat in task.prompt"
            ) from error

    def _rendered(self, messages: Chat) -> str:
        """The chat as text. A template is a program that comes with the tokenizer and may raise any error."""
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=messages[-1]["role"] == "user"
        )

    @property
    def _template(self) -> str:
        return f"the chat template of the tokenizer {self.tokenizer.name_or_path!r}"


def _opened(prompts: Sequence[str], systems: Sequence[str | None] | None) -> list[Chat]:
    """The messages of each chat before its answer."""
    users = [{"role": "user", "content": prompt} for prompt in prompts]
    if systems is None:
        return [[user] for user in users]
    return [
        [user] if system is None else [{"role": "system", "content": system}, user]
        for system, user in zip(systems, users, strict=True)
    ]


@dataclass(frozen=True)
class Cut:
    """Numbers of rows that were shortened.

    Attributes:
        prompts: number of rows that lost the beginning of their prompt.
        answers: number of rows that also lost the end of their answer, because the answer alone was too long.
    """

    prompts: int = 0
    answers: int = 0


def fit(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], longest: int, *, same_prompt: int = 1
) -> tuple[list[list[int]], list[list[int]], Cut]:
    """Cut rows to ``longest`` tokens: first the beginning of the prompt, then the end of the answer.

    An answer is cut only if it is too long even with a single token before it. A cut answer has no end of
    sequence, so that the model does not learn to stop there.

    Args:
        prompts: tokens of each row's prompt.
        answers: tokens of each row's answer.
        longest: largest number of tokens of a row.
        same_prompt: number of rows in turn that have the same prompt. All lose the same tokens of it, as many
            as the one with the longest answer.
    """
    kept = [answer if len(answer) < longest else answer[: longest - 1] for answer in answers]
    excess = [len(prompt) + len(answer) - longest for prompt, answer in zip(prompts, kept, strict=True)]
    lost = [
        max(0, min(max(excess[number - number % same_prompt :][:same_prompt]), len(prompt) - 1))
        for number, prompt in enumerate(prompts)
    ]
    return (
        [prompt[drop:] for prompt, drop in zip(prompts, lost, strict=True)],
        kept,
        Cut(sum(drop > 0 for drop in lost), sum(map(list.__ne__, kept, answers))),
    )


def cut_note(cut: Cut, rows: int, longest: int, what: str) -> list[str]:
    """A note about rows that were shortened; empty if there are none."""
    if not cut.prompts and not cut.answers:
        return []
    return [
        f"{what} rows longer than task.max_length = {longest} tokens: {cut.prompts} of {rows} lose the "
        f"beginning of their prompt, {cut.answers} the end of their answer"
    ]


def length_facts(lengths: Sequence[int], what: str, parts: str = "rows") -> str:
    """A line about the numbers of tokens of rows."""
    if not lengths:
        return f"{what} {parts}: none here"
    ordered = sorted(lengths)
    return (
        f"{what} {parts}: {ordered[0]} to {ordered[-1]} tokens, half of them at most "
        f"{ordered[(len(ordered) - 1) // 2]}, {sum(ordered)} in all"
    )
