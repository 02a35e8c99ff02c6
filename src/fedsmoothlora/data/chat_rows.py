"""Rows that are chats: from texts to tokens with the assistant's turns marked, and notes for the user."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedsmoothlora.data.chat_template import ChatTemplate, EncodedChat, Shortened
from fedsmoothlora.data.chats import (
    ASSISTANT,
    CALL_KEYS,
    ROLES,
    SYSTEM,
    SYSTEM_COLUMN,
    TOOLS_COLUMN,
    Chat,
    Form,
    Message,
    from_user_on,
    parsed,
    parsed_tools,
    to_last_answer,
)
from fedsmoothlora.data.texts import Texts
from fedsmoothlora.errors import DataError


@dataclass(frozen=True)
class _Row:
    chat: Chat
    tools: list[Any] | None
    place: str
    has_other_system: bool  # in the column, beside the system turn of the chat


@dataclass(frozen=True)
class ChatRows:
    """Reads rows of chats with the chat template of a tokenizer.

    Attributes:
        template: the chat template.
        form: the columns of the rows.
        longest: largest number of tokens of a row.
        system: text of the system turn of rows that have none.
    """

    template: ChatTemplate
    form: Form
    longest: int
    system: str | None = None

    def encoded(self, texts: Texts, what: str) -> tuple[list[EncodedChat], list[str]]:
        """The tokens of every row, and notes for the user.

        Args:
            texts: the rows.
            what: name of the rows in the notes.

        Raises ``DataError`` with the place of a row that is no chat, or that the template does not take.
        """
        counts, rows, found = Shortened(), self._rows(texts), []
        systems = begun = ended = silent = unread = 0
        others: Counter[str] = Counter()
        for row in rows:
            chat = self._with_system(row.chat)
            from_user = from_user_on(chat)
            kept = to_last_answer(from_user)
            begun += len(from_user) < len(chat)
            ended += len(kept) < len(from_user)
            systems += kept[:1] != [] and kept[0]["role"] == SYSTEM
            if not kept:
                _refuse_unanswered(row)
            silent += any(map(_is_silent, kept))
            others.update({message["role"] for message in kept} - {*ROLES})
            fitting = self.template.fitting(kept)
            found.append(self.template.shortened(fitting, row.place, self.longest, counts, row.tools))
            unread += self.template.leaves_out(row.tools, fitting)
        return found, [
            *_count_note(
                0 if self.template.takes_system else systems,
                len(rows),
                what,
                "have a system turn, which the chat template does not take: its text stands at the "
                "beginning of the first user turn",
            ),
            *_count_note(
                sum(row.has_other_system for row in rows),
                len(rows),
                what,
                f"have a system turn that differs from their column {SYSTEM_COLUMN!r}: the turn is used",
            ),
            *_count_note(begun, len(rows), what, "begin with the assistant: that turn is left out"),
            *_count_note(
                ended, len(rows), what, "end with a turn that is not the assistant's: it is left out"
            ),
            *_count_note(
                silent, len(rows), what, "have an empty turn of the assistant: at most its end is learned"
            ),
            *unmarked_notes(found, what),
            *unread_tools_note(unread, len(rows), what),
            *(
                note
                for role, count in sorted(others.items())
                for note in _count_note(
                    count, len(rows), what, f"have turns of the role {role!r}: they are read, but not learned"
                )
            ),
            *_shortened_notes(counts, len(rows), what, self.longest),
        ]

    def prompts(self, texts: Texts) -> tuple[list[list[int]], list[str]]:
        """The tokens of every chat before the last answer, and these answers."""
        prompts, answers = [], []
        for row in self._rows(texts):
            if not (kept := self._to_last_answer(row)):
                _refuse_unanswered(row)
            prompts.append(self.template.prompt(self.template.fitting(kept[:-1]), row.place, row.tools))
            answers.append(str(kept[-1]["content"]))
        return prompts, answers

    def with_text(self, texts: Texts) -> list[int]:
        """The numbers of the rows whose last answer has a text; the others end with a call of a function."""
        chats = map(self._to_last_answer, self._rows(texts))
        return [number for number, chat in enumerate(chats) if not chat or str(chat[-1]["content"]).strip()]

    def without_text_note(self, texts: Texts, what: str) -> list[str]:
        """A note about chats without a text to compare; empty if there are none."""
        return _count_note(
            len(texts) - len(self.with_text(texts)),
            len(texts),
            what,
            "end with an answer without text, such as a call of a function: exact-match leaves them out",
        )

    def facts(self, texts: Texts) -> str:
        """A line about the numbers of turns."""
        chats = [row.chat for row in self._rows(texts)]
        turns = sorted(map(len, chats))
        answers = sum(message["role"] == ASSISTANT for chat in chats for message in chat)
        return (
            f"training chats: {turns[0]} to {turns[-1]} turns, half of them at most "
            f"{turns[(len(turns) - 1) // 2]}; {answers} turns of the assistant"
        )

    def _rows(self, texts: Texts) -> list[_Row]:
        column, tools = self.form.column, texts.columns.get(TOOLS_COLUMN)
        systems = texts.columns.get(SYSTEM_COLUMN) if SYSTEM_COLUMN in self.form.columns[1:] else None
        found = []
        for number, text in enumerate(texts.columns[column]):
            place = texts.place(number)
            where, tools_at = f"{place}, column {column!r}", f"{place}, column {TOOLS_COLUMN!r}"
            given = None if tools is None else parsed_tools(tools[number], tools_at)
            chat, system = parsed(text, where), "" if systems is None else systems[number]
            if system.strip() and chat[0]["role"] != SYSTEM:
                chat = [{"role": SYSTEM, "content": system}, *chat]
            differs = bool(system.strip()) and system.strip() != str(chat[0]["content"]).strip()
            found.append(_Row(chat, given, where, differs))
        return found

    def _to_last_answer(self, row: _Row) -> Chat:
        return to_last_answer(from_user_on(self._with_system(row.chat)))

    def _with_system(self, chat: Chat) -> Chat:
        if self.system is None or chat[0]["role"] == SYSTEM:
            return chat
        return [{"role": SYSTEM, "content": self.system}, *chat]


def _is_silent(message: Message) -> bool:
    """Whether a turn of the assistant has neither a text nor a call of a function."""
    has_calls = any(map(message.get, CALL_KEYS))
    return message["role"] == ASSISTANT and not message["content"].strip() and not has_calls


def _refuse_unanswered(row: _Row) -> None:
    raise DataError(f"{row.place}: the assistant answers no turn of a user, so there is nothing to learn")


def _count_note(count: int, rows: int, what: str, why: str) -> list[str]:
    return [f"{count} of {rows} {what} chats {why}"] if count else []


def unmarked_notes(rows: Sequence[EncodedChat], what: str) -> list[str]:
    """Notes about chats whose ends of turns or calls the template's own marks leave out."""
    return [
        *_count_note(
            sum(not row.has_ends for row in rows),
            len(rows),
            what,
            "have turns of the assistant whose end is outside the {% generation %} marks of the chat "
            "template: the model does not learn to end them; put the end-of-turn token before "
            "{% endgeneration %}",
        ),
        *_count_note(
            sum(not row.has_calls for row in rows),
            len(rows),
            what,
            "have calls of functions outside the {% generation %} marks of the chat template: the model "
            "does not learn them; put the calls before {% endgeneration %}",
        ),
    ]


def unread_tools_note(count: int, rows: int, what: str) -> list[str]:
    """A note about chats whose functions the chat template does not write; empty if there are none."""
    return _count_note(
        count,
        rows,
        what,
        f"have functions (column {TOOLS_COLUMN!r}), which the chat template leaves out: the model does not "
        "read them; set task.chat_template to one that writes them",
    )


def _shortened_notes(counts: Shortened, rows: int, what: str, longest: int) -> Sequence[str]:
    if not counts.chats and not counts.first:
        return []
    return [
        f"{what} chats longer than task.max_length = {longest} tokens: {counts.chats} of {rows} lose "
        f"{counts.turns} turns at their end, and {counts.first} are cut within their first exchange"
    ]
