"""Chats as rows of data: their forms, recognised by their columns, and their messages."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedsmoothlora.errors import DataError

# A message of a chat: ``role``, ``content``, and further keys for the template, such as ``tool_calls``.
Message = dict[str, Any]
Chat = list[Message]

# Columns of whole chats, by the names under which data sets publish them.
CHAT_COLUMNS = ("messages", "conversations", "conversation")
TOOLS_COLUMN = "tools"
# Columns beside chats and instructions: the text of the system turn, and pairs of earlier turns.
SYSTEM_COLUMN, HISTORY_COLUMN = "system", "history"

# The keys of a message with calls of functions; OpenAI's older one holds a single call.
CALL_KEYS = ("tool_calls", "function_call")

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# The roles of chat templates.
ROLES = (SYSTEM, USER, ASSISTANT, "tool", "developer", "function", "ipython")

# The roles of ShareGPT's ``from``, which data sets also use as values of ``role``.
_ROLES: Mapping[str, str] = {
    **{role: role for role in ROLES},
    "human": USER,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bing": ASSISTANT,
    "bard": ASSISTANT,
    "model": ASSISTANT,
    "function_call": ASSISTANT,
    "observation": "tool",
    "function_response": "tool",
}

_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{middle}### Response:"
)


@dataclass(frozen=True)
class Form:
    """The form of rows.

    Attributes:
        name: ``chat``, or ``alpaca`` for an instruction with its answer.
        columns: the columns that are read.
        more: columns of instructions that are read only in some settings: ``system`` and ``history``.
    """

    name: Literal["chat", "alpaca"]
    columns: tuple[str, ...]
    more: tuple[str, ...] = ()

    @property
    def column(self) -> str:
        """The column of the chats."""
        return self.columns[0]


def recognised(columns: Collection[str]) -> Form | None:
    """The form of rows with these columns; None if they are neither chats nor instructions."""
    for name in CHAT_COLUMNS:
        if name in columns:
            return chat_form(name, columns)
    if "instruction" in columns and "output" in columns:
        return Form(
            "alpaca",
            tuple(n for n in ("instruction", "input", "output") if n in columns),
            tuple(n for n in (SYSTEM_COLUMN, HISTORY_COLUMN) if n in columns),
        )
    return None


def chat_form(column: str, columns: Collection[str]) -> Form:
    """The form of rows with a chat in ``column``, perhaps its functions and its system turn."""
    others = (TOOLS_COLUMN, SYSTEM_COLUMN)
    return Form("chat", (column, *(name for name in others if name in columns and name != column)))


@dataclass(frozen=True)
class AlpacaPrompt:
    """The prompt of an instruction with an optional input, in place of a `data.prompts.Template`.

    As a turn of a chat, it is the instruction, a blank line and the input. Otherwise it is the text of
    Stanford Alpaca, which differs with and without an input.

    Attributes:
        columns: ``instruction`` and, if the data have it, ``input``; also ``system``, if its text stands at
            the beginning of the turn.
        chat: whether the prompt is a turn of a chat.
        key: the configuration key for errors.
    """

    columns: tuple[str, ...]
    chat: bool = False
    key: str = "task.prompt"

    def fill(self, row: Mapping[str, str]) -> str:
        """The prompt of a row."""
        instruction, given = row["instruction"], row.get("input", "")
        if self.chat:
            system = row[SYSTEM_COLUMN] if SYSTEM_COLUMN in self.columns else ""
            return "\n\n".join([*filter(str.strip, [system]), instruction, *filter(str.strip, [given])])
        if not given.strip():
            return _ALPACA.format(more="", instruction=instruction, middle="")
        return _ALPACA.format(
            more=", paired with an input that provides further context",
            instruction=instruction,
            middle=f"### Input:\n{given}\n\n",
        )


# The template of `AlpacaPrompt` without an input, for generation.
ALPACA_TEMPLATE = _ALPACA.format(more="", instruction="{instruction}", middle="")


def parsed(text: str, place: str) -> Chat:
    """The messages of a row.

    Args:
        text: a JSON array of messages with ``role`` and ``content``, or ``from`` and ``value``.
        place: the place of the row and the column, for errors.

    Returns:
        Messages with ``role`` and ``content``. Names of roles that ShareGPT uses become those of chat
        templates, also in capital letters, and the texts of a content in parts are joined. Other keys stay
        unless they are null.

    Raises:
        DataError: it is no such array, no message is the assistant's, or one of the assistant's is marked as
            not to be learned.
    """
    messages = parsed_messages(text, place)
    if not any(message["role"] == ASSISTANT for message in messages):
        roles = ", ".join(dict.fromkeys(_short(message["role"]) for message in messages))
        raise DataError(
            f"{place}: no message is the assistant's, so there is nothing to learn; the roles are {roles}"
        )
    return messages


def parsed_messages(text: str, place: str) -> Chat:
    """As `parsed`, without asking for an answer of the assistant."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not found:
        raise DataError(f"{place}: holds {_short(text)}; should be a list of messages with role and content")
    return [_message(value, f"{place}, message {number}") for number, value in enumerate(found, 1)]


def is_chat(text: str) -> bool:
    """Whether a cell holds a JSON array of objects, as a chat does."""
    if not text.lstrip().startswith("["):
        return False
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, list) and bool(found) and all(isinstance(message, dict) for message in found)


def has_turns(text: str) -> bool:
    """Whether a cell holds a chat whose messages all have a role, unlike other JSON arrays of objects."""
    return is_chat(text) and all(message.keys() & {"role", "from"} for message in json.loads(text))


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{place}: is {_short(value)}; should have the keys role and content")
    role, content = ("role", "content") if "role" in value else ("from", "value")
    if not isinstance(value.get(role), str):
        raise DataError(f"{place}: has the keys {list(value)}; should be role and content, or from and value")
    own = {key: part for key, part in value.items() if key not in (role, content) and part is not None}
    text = _content(value.get(content), place)
    if text is None and not own.keys() & {*CALL_KEYS}:
        raise DataError(f"{place}: has no text ({content})")
    name = _ROLES.get(value[role].strip().lower(), value[role])
    for key in ("weight", "train"):
        if name == ASSISTANT and own.get(key) in (0, False):
            raise DataError(
                f"{place}: {key} = {json.dumps(own[key])}, but every turn of the assistant is learned; end "
                "the chat before this turn, or remove the key"
            )
    return {"role": name, "content": text or "", **own}


def _content(value: Any, place: str) -> str | None:
    """The text of a message; a list of parts is joined."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        return "".join(str(part.get("text", "")) for part in value)
    raise DataError(f"{place}: its content is {_short(value)}; should be text")


def parsed_tools(text: str, place: str) -> list[Any] | None:
    """The functions that the assistant may call, JSON schemas in a JSON array; None if there are none.

    Raises ``DataError`` if it is no such array.
    """
    if not text.strip():
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = text
    if found is None or found == []:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise DataError(f"{place}: holds {_short(text)}; should be a list of functions as JSON schemas")
    return found


def from_user_on(chat: Chat) -> Chat:
    """The chat without the assistant's turns before the first user turn; system turns stay."""
    first = next((number for number, message in enumerate(chat) if message["role"] == USER), len(chat))
    return [m for number, m in enumerate(chat) if number >= first or m["role"] != ASSISTANT]


def to_last_answer(chat: Chat) -> Chat:
    """The chat up to the last of the assistant's turns."""
    last = max((number for number, m in enumerate(chat) if m["role"] == ASSISTANT), default=-1)
    return chat[: last + 1]


def exchanges(chat: Chat) -> list[int]:
    """The numbers of messages after which the chat may end: the assistant answered, and a user follows."""
    return [
        number
        for number, message in enumerate(chat, 1)
        if message["role"] == ASSISTANT and (number == len(chat) or chat[number]["role"] in (USER, SYSTEM))
    ]


def without_first_exchange(chat: Chat) -> Chat:
    """The chat without its first user turn and all that follows up to the next user turn, if there is one."""
    users = [number for number, message in enumerate(chat) if message["role"] == USER]
    return [*chat[: users[0]], *chat[users[1] :]] if len(users) > 1 else chat


def with_system_in_user_turn(chat: Chat) -> Chat:
    """The chat with the text of its first system turn at the beginning of the first user turn."""
    if chat[0]["role"] != SYSTEM:
        return chat
    first, *rest = chat
    number = next((n for n, message in enumerate(rest) if message["role"] == USER), None)
    if number is None:
        return rest
    user = {**rest[number], "content": f"{first['content']}\n\n{rest[number]['content']}"}
    return [*rest[:number], user, *rest[number + 1 :]]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
