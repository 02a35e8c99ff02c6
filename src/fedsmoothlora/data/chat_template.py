"""Chats as tokens, by the tokenizer's own chat template, with the tokens that the assistant writes marked."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress, pairwise
from typing import Any

from fedsmoothlora.data.chats import (
    ASSISTANT,
    CALL_KEYS,
    SYSTEM,
    USER,
    Chat,
    exchanges,
    with_system_in_user_turn,
)
from fedsmoothlora.data.prompts import fit
from fedsmoothlora.errors import ConfigError, DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SYSTEM_TEXT = "Answer briefly, 271828."


@dataclass(frozen=True)
class EncodedChat:
    """The tokens of a chat, up to the last that the assistant writes.

    Attributes:
        ids: tokens.
        taught: for each token, whether the assistant writes it, so that the loss is taken on it.
        has_ends: whether the ends of the assistant's turns are learned; not if the template's own marks leave
            them out.
        has_calls: the same of calls of functions.
    """

    ids: list[int]
    taught: list[bool]
    has_ends: bool = True
    has_calls: bool = True


@dataclass
class Shortened:
    """Numbers of chats that were shortened.

    Attributes:
        chats: number of chats that lost turns at their end.
        turns: number of turns that they lost.
        first: number of chats whose first exchange alone was too long and was cut too.
    """

    chats: int = 0
    turns: int = 0
    first: int = 0


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer.

    The tokens of a chat are those of ``tokenizer.apply_chat_template``. If the template marks what the
    assistant writes (``{% generation %}``), these marks are used as they are, even without the ends of turns,
    as trl does with ``assistant_only_loss``. Otherwise, the assistant's turn ``k`` is the difference between
    two renderings: the chat up to turn ``k``, and the chat before it with the prompt for the assistant. Both
    must be prefixes of the whole chat. The turn ends with the last special token that the template writes
    into it, such as ``<|im_end|>``. A token belongs to the assistant if any of its characters does, as in
    transformers.

    Attributes:
        tokenizer: the tokenizer of the model; a fast one, which knows the characters of every token.
    """

    tokenizer: Any
    _special: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        name = self.tokenizer.name_or_path
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"the data are chats, and the tokenizer {name!r} has no chat template: set "
                "task.chat_template, or take an instruction model"
            )
        if not self.tokenizer.is_fast:
            raise ConfigError(
                f"the data are chats, and the tokenizer {name!r} is not a fast one (of the library "
                "tokenizers), so the tokens of the assistant's turns cannot be told from the others"
            )
        added = self.tokenizer.added_tokens_decoder
        marked = {number for number, token in added.items() if token.special}
        object.__setattr__(self, "_special", frozenset(self.tokenizer.all_special_ids) | marked)

    @cached_property
    def takes_system(self) -> bool:
        """Whether the template writes a system turn; others refuse it or leave it out."""
        chat = [{"role": SYSTEM, "content": _SYSTEM_TEXT}, {"role": USER, "content": "1+1?"}]
        try:
            return _SYSTEM_TEXT in self.text(chat)
        except Exception:  # a template is a program and may raise any error
            return False

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a turn of the assistant."""
        chat = [{"role": USER, "content": "1+1?"}, {"role": ASSISTANT, "content": "2"}]
        last = self.encoded(chat, "a chat of two turns").ids[-1]
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys(token for token in (last, eos) if token in self._special))

    def fitting(self, chat: Chat) -> Chat:
        """The chat as the template takes it: a system turn that it does not take goes into the user's."""
        return chat if self.takes_system else with_system_in_user_turn(chat)

    def text(self, chat: Chat, tools: list[Any] | None = None, *, answer_follows: bool = False) -> str:
        """The chat as text. A template is a program that comes with the tokenizer and may raise any error."""
        written: str = self.tokenizer.apply_chat_template(
            chat, tools=tools, tokenize=False, add_generation_prompt=answer_follows
        )
        return written

    def leaves_out(self, tools: list[Any] | None, chat: Chat) -> bool:
        """Whether the template writes a chat, on which it does not fail, without the functions ``tools``."""
        return bool(tools) and self._writes(self.text(chat, tools), chat, None)

    def prompt(self, chat: Chat, place: str, tools: list[Any] | None = None) -> list[int]:
        """The tokens of a chat, after which the assistant answers.

        Raises ``DataError`` that names the ``place`` if the template fails.
        """
        text = self._written(chat, tools, place, answer_follows=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def encoded(self, chat: Chat, place: str, tools: list[Any] | None = None) -> EncodedChat:
        """The tokens of a chat that ends with a turn of the assistant.

        Args:
            chat: the messages.
            place: the place of the row, for errors.
            tools: functions that the assistant may call.

        Raises:
            DataError: the template fails, leaves out a turn or a call of a function, or writes a turn
                differently when others follow, so that the tokens of the assistant cannot be found.
        """
        text = self._written(chat, tools, place)
        self._check_turns(chat, tools, text, place)
        self._check_calls(chat, tools, text, place)
        if _GENERATION.search(self._source(tools)):
            ids, taught = self._masked(chat, tools)
            if not any(taught):
                raise DataError(f"{place}: {self._name} marks no token as the assistant's")
            has_ends, has_calls = self._marks_ends(ids, taught), self._marks_calls(chat, tools, ids, taught)
            return replace(_to_last(ids, taught), has_ends=has_ends, has_calls=has_calls)
        spans = self._spans(chat, tools, text, place)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return self._marked(encoded["input_ids"], encoded["offset_mapping"], spans)

    def shortened(
        self,
        chat: Chat,
        place: str,
        longest: int,
        counts: Shortened,
        tools: list[Any] | None = None,
    ) -> EncodedChat:
        """The tokens of as many whole exchanges from the beginning as fit.

        Exchanges at the end are left out, so every turn that stays has its whole context. If the first
        exchange alone is too long, it loses the beginning of its prompt, and its end only if the answer alone
        is too long.

        Args:
            chat, place, tools: as in `encoded`.
            longest: largest number of tokens.
            counts: shortened chats are added to it.
        """
        whole = self.encoded(chat, place, tools)
        if len(whole.ids) <= longest:
            return whole
        cuts = exchanges(chat)
        found = {cuts[-1]: whole}

        def tokens(cut: int) -> int:
            found[cut] = self.encoded(chat[:cut], place, tools)
            return len(found[cut].ids)

        fits = bisect_right(cuts[:-1], longest, key=tokens)
        kept = cuts[max(fits - 1, 0)]
        if kept < len(chat):
            counts.chats += 1
            counts.turns += len(chat) - kept
        row = found.get(kept) or self.encoded(chat[:kept], place, tools)
        if len(row.ids) <= longest:
            return row
        counts.first += 1
        return cut_to(row, longest)

    def _spans(self, chat: Chat, tools: list[Any] | None, text: str, place: str) -> list[tuple[int, int]]:
        """First and last place of the characters of every turn of the assistant."""
        spans = []
        for number, message in enumerate(chat):
            if message["role"] != ASSISTANT:
                continue
            before = self._written(chat[:number], tools, place, answer_follows=True)
            after = self._written(chat[: number + 1], tools, place)
            if not (after.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"{place}, message {number + 1}: {self._name} writes the chat before this turn, or the "
                    "turn itself, differently when other turns follow, so the assistant's text cannot be "
                    "told from the rest; take a template with {% generation %} marks"
                )
            spans.append((len(before), len(after)))
        return spans

    def _marked(
        self, ids: list[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
    ) -> EncodedChat:
        """Mark the tokens of the spans, each up to its last special token."""
        taught = [False] * len(ids)
        ends_properly = False
        for first, last in spans:
            own = [
                n for n, (start, end) in enumerate(offsets) if start < last and end > first and end > start
            ]
            special = [n for n in own if ids[n] in self._special]
            ends_properly = bool(special)
            for number in own:
                taught[number] = not special or number <= special[-1]
        row = _to_last(ids, taught)
        eos = self.tokenizer.eos_token_id
        if not ends_properly and eos is not None:  # otherwise the model would not learn to stop
            return EncodedChat([*row.ids, eos], [*row.taught, True])
        return row

    def _masked(self, chat: Chat, tools: list[Any] | None) -> tuple[list[int], list[bool]]:
        """The tokens of a chat and the template's own marks."""
        encoded = self.tokenizer.apply_chat_template(
            chat,
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        marks = [bool(mark) for mark in encoded["assistant_masks"]]
        return encoded["input_ids"], _with_whole_characters(marks, encoded["offset_mapping"])

    def _marks_calls(self, chat: Chat, tools: list[Any] | None, ids: list[int], taught: list[bool]) -> bool:
        """Whether the template's marks contain every call: without it, other tokens are marked."""
        learned = list(compress(ids, taught))
        for _, _, fewer in _with_one_call_less(chat):
            try:
                found = list(compress(*self._masked(fewer, tools)))
            except Exception:  # the template needs the call
                continue
            if found == learned:
                return False
        return True

    def _marks_ends(self, ids: list[int], taught: list[bool]) -> bool:
        """Whether the template's marks contain the special tokens that end turns.

        Not if a special token follows marked text, or if the last marked text has none at its end.
        """
        ends = [n for n, (mark, next_mark) in enumerate(pairwise([*taught, False]), 1) if mark > next_mark]
        return all(
            self._begins_special(ids[end - 1 :: -1])
            or (end != ends[-1] and not self._begins_special(ids[end:]))
            for end in ends
        )

    def _begins_special(self, ids: list[int]) -> bool:
        """Whether the first token that is not blank is a special one."""
        special = self._special
        return next((n in special for n in ids if n in special or self.tokenizer.decode([n]).strip()), False)

    def _check_turns(self, chat: Chat, tools: list[Any] | None, text: str, place: str) -> None:
        """Raise ``DataError`` if the template leaves out a turn of a role that it does not know."""
        for number, message in enumerate(chat):
            if message["role"] in (USER, ASSISTANT) or not message["content"].strip():
                continue
            if self._writes(text, [*chat[:number], *chat[number + 1 :]], tools):
                raise DataError(
                    f"{place}, message {number + 1}: {self._name} leaves out turns of the role "
                    f"{message['role']!r}; remove them, or take a template that writes them"
                )

    def _check_calls(self, chat: Chat, tools: list[Any] | None, text: str, place: str) -> None:
        """Raise ``DataError`` if the template leaves out a call: the turn would be learned without it."""
        for number, key, fewer in _with_one_call_less(chat):
            if self._writes(text, fewer, tools):
                raise DataError(
                    f"{place}, message {number + 1}: {self._name} leaves out a call of a function "
                    f"({key}), so it would not be learned; take a template that writes calls "
                    "(task.chat_template), or write the call into the content of the turn"
                )

    def _writes(self, text: str, chat: Chat, tools: list[Any] | None) -> bool:
        """Whether the template writes a chat as ``text``; not if it fails on the chat."""
        try:
            return self.text(chat, tools) == text
        except Exception:
            return False

    def _written(
        self, chat: Chat, tools: list[Any] | None, place: str, *, answer_follows: bool = False
    ) -> str:
        try:
            return self.text(chat, tools, answer_follows=answer_follows)
        except Exception as error:
            roles = ", ".join(message["role"] for message in chat)
            raise DataError(f"{place}: {self._name} fails on a chat of the turns {roles}: {error}") from error

    def _source(self, tools: list[Any] | None) -> str:
        source: str = self.tokenizer.get_chat_template(tools=tools)
        return source

    @property
    def _name(self) -> str:
        return f"the chat template of the tokenizer {self.tokenizer.name_or_path!r}"


def _with_whole_characters(taught: list[bool], offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """The marks of transformers, which end with the first token of the last marked character, to its last.

    A character outside of the vocabulary, such as an emoji, has several tokens.
    """
    found = list(taught)
    for number, ((_, end), (start, _)) in enumerate(pairwise(offsets), 1):
        found[number] |= found[number - 1] and start < end
    return found


def _with_one_call_less(chat: Chat) -> Iterator[tuple[int, str, Chat]]:
    """The chat without one call of a function, for each; with the number of its message and its key."""
    for number, message in enumerate(chat):
        for key in CALL_KEYS:
            rest = {name: value for name, value in message.items() if name != key}
            calls, fewer = message.get(key), []
            if isinstance(calls, list) and len(calls) > 1:
                fewer = [{**rest, key: [*calls[:n], *calls[n + 1 :]]} for n in range(len(calls))]
            elif calls:
                fewer = [rest]
            for one in fewer:
                yield number, key, [*chat[:number], one, *chat[number + 1 :]]


def last_answer(row: EncodedChat) -> EncodedChat:
    """The same tokens, with a loss on the last turn of the assistant only."""
    first = len(row.taught) - next(
        (number for number, taught in enumerate(row.taught[::-1]) if not taught), len(row.taught)
    )
    return replace(row, taught=[number >= first for number in range(len(row.ids))])


def cut_to(row: EncodedChat, longest: int) -> EncodedChat:
    """The row cut to ``longest`` tokens as `data.prompts.fit` cuts: first its prompt, then its end."""
    start = row.taught.index(True)
    (prompt,), (rest,), _ = fit([row.ids[:start]], [row.ids[start:]], longest)
    taught = [False] * len(prompt) + row.taught[start : start + len(rest)]
    return replace(row, ids=[*prompt, *rest], taught=taught)


def _to_last(ids: list[int], taught: list[bool]) -> EncodedChat:
    """The tokens up to the last one with a loss."""
    end = len(taught) - taught[::-1].index(True)
    return EncodedChat(ids[:end], taught[:end])
