"""Rows that are chats or instructions: recognised by their columns, and read into messages."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.data.chats import (
    AlpacaPrompt,
    Form,
    exchanges,
    from_user_on,
    parsed,
    parsed_tools,
    recognised,
    to_last_answer,
    with_system_in_user_turn,
)
from fedsmoothlora.errors import DataError


def chat(roles: str) -> list[dict[str, str]]:
    """A chat by the first letters of its roles."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": names[letter], "content": f"{letter}{n}"} for n, letter in enumerate(roles)]


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (["id", "messages"], Form("chat", ("messages",))),
        (["conversations", "source"], Form("chat", ("conversations",))),
        (["messages", "tools"], Form("chat", ("messages", "tools"))),
        (["system", "conversations"], Form("chat", ("conversations", "system"))),
        (["system", "tools", "messages"], Form("chat", ("messages", "tools", "system"))),
        (
            ["history", "output", "system", "instruction"],
            Form("alpaca", ("instruction", "output"), ("system", "history")),
        ),
        (["output", "input", "instruction"], Form("alpaca", ("instruction", "input", "output"))),
        (["instruction", "output"], Form("alpaca", ("instruction", "output"))),
        (["instruction", "response"], None),
        (["question", "answer"], None),
    ],
)
def test_a_form_is_recognised_by_its_columns(columns: list[str], form: Form | None) -> None:
    assert recognised(columns) == form


def test_sharegpt_s_keys_and_roles_become_those_of_chat_templates() -> None:
    row = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "u"},
        {"from": "gpt", "value": "a"},
        {"from": "observation", "value": "t"},
    ]
    assert parsed(json.dumps(row), "row 1") == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "tool", "content": "t"},
    ]


@pytest.mark.parametrize(
    ("role", "wanted"),
    [
        ("User", "user"),
        ("ASSISTANT", "assistant"),
        ("GPT", "assistant"),
        (" System", "system"),
        ("Bob", "Bob"),
    ],
)
def test_roles_in_capital_letters_are_those_of_chat_templates(role: str, wanted: str) -> None:
    row = [{"role": role, "content": "x"}, {"role": "assistant", "content": "y", "weight": 1}]
    assert [message["role"] for message in parsed(json.dumps(row), "row 1")] == [wanted, "assistant"]


def test_parts_of_a_content_are_joined_and_null_keys_are_dropped() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    row = [
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+1?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
    ]
    assert parsed(json.dumps(row), "row 1") == [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("hello", r"^row 7: holds 'hello'; should be a list of messages"),
        ([], r"^row 7: holds '\[\]'; should be a list of messages"),
        ("", r"^row 7: holds ''; should be a list of messages"),
        (["hello"], r"^row 7, message 1: is 'hello'; should have the keys role and content"),
        ([{"text": "x"}], r"^row 7, message 1: has the keys \['text'\]; should be role and content"),
        ([{"role": "user"}], r"^row 7, message 1: has no text \(content\)"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            r"^row 7, message 1: its content is .*; should be text",
        ),
        (
            [{"role": "user", "content": "x"}, {"role": "reply", "content": "y"}],
            r"^row 7: no message is the assistant's.*; the roles are 'user', 'reply'$",
        ),
        (
            [{"role": "assistant", "content": "x", "weight": 0}],
            r"^row 7, message 1: weight = 0, but every turn of the assistant is learned",
        ),
        (
            [{"from": "gpt", "value": "x", "train": False}],
            r"^row 7, message 1: train = false, but every turn of the assistant is learned",
        ),
    ],
    ids=["text", "empty", "blank", "texts", "keys", "no-text", "image", "no-answer", "weight", "train"],
)
def test_a_row_that_is_no_chat_is_refused_with_its_place(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parsed(row if isinstance(row, str) else json.dumps(row), "row 7")


def test_tools_are_a_list_of_schemas_or_none() -> None:
    assert parsed_tools("", "row 1") is parsed_tools("[]", "row 1") is parsed_tools("null", "row 1") is None
    assert parsed_tools('[{"name": "add"}]', "row 1") == [{"name": "add"}]
    with pytest.raises(DataError, match="row 1: holds 'add'; should be a list of functions"):
        parsed_tools("add", "row 1")


def test_instructions_have_alpaca_s_text_or_are_a_turn_of_a_chat() -> None:
    columns = ("instruction", "input")
    both, alone = {"instruction": "Add {x}.", "input": "1 2"}, {"instruction": "Add {x}.", "input": " "}
    prompt = AlpacaPrompt(columns)
    assert prompt.fill(both) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd {x}.\n\n"
        "### Input:\n1 2\n\n### Response:"
    )
    assert prompt.fill(alone) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd {x}.\n\n### Response:"
    )
    assert AlpacaPrompt(columns, chat=True).fill(both) == "Add {x}.\n\n1 2"
    assert AlpacaPrompt(columns[:1], chat=True).fill({"instruction": "Add."}) == "Add."


@given(st.text("suat", max_size=8))
def test_chats_are_cut_to_whole_exchanges(roles: str) -> None:
    whole = chat(roles)
    kept = to_last_answer(from_user_on(whole))
    assert all(message in whole for message in kept)
    if kept:
        assert kept[-1]["role"] == "assistant"
        users = [n for n, m in enumerate(kept) if m["role"] == "user"]
        assert users
        assert all(m["role"] != "assistant" for m in kept[: users[0]])
    for cut in exchanges(kept):
        assert kept[cut - 1]["role"] == "assistant"
        assert cut == len(kept) or kept[cut]["role"] in ("user", "system")
    assert exchanges(kept)[-1:] == ([len(kept)] if kept else [])


def test_a_system_turn_moves_to_the_beginning_of_the_first_user_turn() -> None:
    assert with_system_in_user_turn(chat("sua")) == [
        {"role": "user", "content": "s0\n\nu1"},
        {"role": "assistant", "content": "a2"},
    ]
    assert with_system_in_user_turn(chat("ua")) == chat("ua")
