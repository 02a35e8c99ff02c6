"""Prompts and answers: templates over a row's columns, and the tokens they become."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from fedsmoothlora.data.texts import Texts
from fedsmoothlora.errors import ConfigError, DataError


@dataclass(frozen=True)
class Template:
    """Text with columns in braces: ``Question: {question}``; ``{{`` and ``}}`` are braces themselves.

    Attributes:
        text: the template.
        key: the configuration's key of it, for errors.

    Raises:
        ConfigError: it cannot be read, or has something else than a column's name in braces.
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
                    f"{self.key} = {self.text!r}: should have columns' names in braces and nothing else "
                    "there; write {{ and }} for braces that are text"
                )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names, in order, each once."""
        names = (name for _, name, _, _ in Formatter().parse(self.text) if name is not None)
        return tuple(dict.fromkeys(names))

    @property
    def spot(self) -> tuple[str, str] | None:
        """The text before its columns and after them; None without any, or where text is between them."""
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

    def fill(self, row: dict[str, str]) -> str:
        """The text with a row's values in it."""
        return "".join(
            literal + (row[name] if name is not None else "")
            for literal, name, _, _ in Formatter().parse(self.text)
        )

    def check(self, columns: Iterable[str]) -> None:
        """Raise ``ConfigError`` for a column that is not among ``columns``."""
        there = list(columns)
        for name in self.columns:
            if name not in there:
                close = difflib.get_close_matches(name, there, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else "."
                raise ConfigError(
                    f"{self.key} names the column {name!r}, which there is not{hint} "
                    f"The columns are: {', '.join(there)}"
                )


def filled(texts: Texts, template: Template) -> list[str]:
    """The template with every row's values.

    Raises ``DataError`` that names the place of a row in which all of the template's columns are blank.
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
    """How a prompt and its answer become tokens.

    Without a chat, these are the prompt's tokens (with those that the tokenizer puts first), the answer's,
    and the end of sequence. In a chat the tokenizer's own template makes a user's turn of the prompt and an
    assistant's of the answer. Prompt and answer are tokenized apart, so that a prompt's tokens are the same
    in training and before generating.

    Attributes:
        tokenizer: of the model.
        chat: use the tokenizer's chat template.
        system: the chat's system message; the template's own, if it has one, unless set.
    """

    tokenizer: Any
    chat: bool = False
    system: str | None = None

    def prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokens of prompts, each ready to be answered."""
        if self.chat:
            return self._tokens([self._chat(prompt) for prompt in prompts])
        found: list[list[int]] = self.tokenizer(list(prompts))["input_ids"] if prompts else []
        end, begin = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        # Some tokenizers end every text; a prompt is not at its end.
        kept = [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in found]
        # The first token of an answer to nothing is predicted from the beginning of a sequence.
        return [ids or ([begin] if begin is not None else []) for ids in kept]

    def answers(self, prompts: Sequence[str], answers: Sequence[str]) -> list[list[int]]:
        """Tokens of answers, each with the token that ends it."""
        end = self.tokenizer.eos_token_id
        if not self.chat:
            return [[*ids, end] for ids in self._tokens(answers)]
        turns = []
        for prompt, answer in zip(prompts, answers, strict=True):
            before, whole = self._chat(prompt), self._chat(prompt, answer)
            if not whole.startswith(before):
                raise ConfigError(
                    "task.chat: the tokenizer's chat template changes the prompt once there is an answer; "
                    "set task.chat = false and write it in task.prompt"
                )
            turns.append(whole[len(before) :])
        found = []
        for ids in self._tokens(turns):
            # What a template writes after the end of a turn is no part of the answer.
            last = len(ids) - ids[::-1].index(end) if end in ids else None
            found.append(ids[:last] if last is not None else [*ids, end])
        return found

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def _chat(self, prompt: str, answer: str | None = None) -> str:
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        messages.append({"role": "user", "content": prompt})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer is None
        )


@dataclass(frozen=True)
class Cut:
    """Rows whose tokens were too many.

    Attributes:
        prompts: how many lost the beginning of their prompt.
        answers: how many lost the end of their answer too, for want of any other room.
    """

    prompts: int = 0
    answers: int = 0


def fit(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], longest: int
) -> tuple[list[list[int]], list[list[int]], Cut]:
    """Cut rows down to ``longest`` tokens: the beginning of the prompt first, and an answer last of all.

    An answer is cut only where it alone, with one token before it, is too long; it then has no end of
    sequence, because it does not end there.
    """
    fitted_prompts, fitted_answers, cut_prompts, cut_answers = [], [], 0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        kept = answer
        if len(answer) >= longest:
            kept = answer[: longest - 1]
            cut_answers += 1
        room = max(longest - len(kept), 1)
        cut_prompts += len(prompt) > room
        fitted_prompts.append(prompt[-room:])
        fitted_answers.append(kept)
    return fitted_prompts, fitted_answers, Cut(cut_prompts, cut_answers)


def cut_note(cut: Cut, rows: int, longest: int, what: str) -> list[str]:
    """A note on rows that were cut, if there are any."""
    if not cut.prompts and not cut.answers:
        return []
    return [
        f"{what} rows longer than task.max_length = {longest} tokens: {cut.prompts} of {rows} lose the "
        f"beginning of their prompt, {cut.answers} the end of their answer"
    ]


def length_facts(lengths: Sequence[int], what: str, parts: str = "rows") -> str:
    """How long rows are, in tokens."""
    ordered = sorted(lengths)
    return (
        f"{what} {parts}: {ordered[0]} to {ordered[-1]} tokens, half of them at most "
        f"{ordered[(len(ordered) - 1) // 2]}, {sum(ordered)} in all"
    )
