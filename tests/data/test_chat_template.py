"""The tokens of chats are those of ``apply_chat_template``; exactly the assistant's have a loss."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import byte_tokenizer
from fedsmoothlora.data.chat_template import ChatTemplate, Shortened, cut_to, last_answer
from fedsmoothlora.errors import ConfigError, DataError

HEAD = "{{ '[' + m.role + ']' }}"
ASK = "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
TURNS = "{% for m in messages %}" + HEAD + "{{ m.content }}<end>\n{% endfor %}" + ASK
MARKED = (
    "{% for m in messages %}" + HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{{ '\n' }}{% endfor %}" + ASK
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No system turn') }}{% endif %}" + TURNS
SILENT_SYSTEM = TURNS.replace("in messages", "in messages if m.role != 'system'")
NO_TOOL = TURNS.replace("in messages", "in messages if m.role != 'tool'")
# As Qwen3 does with the reasoning of earlier turns.
FORGETFUL = (
    "{% for m in messages %}" + HEAD + "{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}"
    "<end>\n{% endfor %}" + ASK
)
# As Mistral's: no header before the assistant's turn, and no special token after a user's.
INST = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<end>{% else %}[INST] "
    "{{ m.content }} [/INST]{% endif %}{% endfor %}"
)
ENDLESS = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}" + HEAD + "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}<end>\n{% endfor %}" + ASK
)


def made(template: str) -> ChatTemplate:
    tokenizer = byte_tokenizer()
    tokenizer.name_or_path, tokenizer.chat_template = "tiny", template
    return ChatTemplate(tokenizer)


def chat(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


TALK = chat(
    ("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"), ("user", "2+2?"), ("assistant", "4 é")
)


def learned(template: ChatTemplate, messages: list[dict[str, Any]], **more: Any) -> list[str]:
    """The texts of the runs of tokens that have a loss."""
    row = template.encoded(messages, "row 1", **more)
    runs: list[list[int]] = []
    befores = [False, *row.taught[:-1]]
    for before, token, taught in zip(befores, row.ids, row.taught, strict=True):
        if taught:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
    return [template.tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [TURNS, MARKED], ids=["rendered", "marked"])
def test_every_turn_of_the_assistant_is_learned_up_to_its_end(template: str) -> None:
    assert learned(made(template), TALK) == ["2<end>", "4 é<end>"]


texts = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12)
MARK = "{% generation %}{{ m.content }}<end>{% endgeneration %}"
OPEN = MARKED.replace(MARK, "{% generation %}{{ m.content }}{% endgeneration %}<end>")
OPEN_LAST = MARKED.replace(
    MARK,
    "{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}<end>"
    "{% else %}" + MARK + "{% endif %}",
)
OPEN_FIRST = OPEN_LAST.replace("loop.last", "loop.index < 3")
MARKED_ENDLESS = MARKED.replace("<end>", "")


@pytest.mark.parametrize(
    ("source", "runs"),
    [
        (OPEN, ["2", "4"]),
        (OPEN_LAST, ["2<end>", "4"]),
        (OPEN_FIRST, ["2", "4<end>"]),
        (MARKED_ENDLESS, ["2", "4"]),
    ],
    ids=["all", "last", "first", "no-special-token"],
)
def test_marks_without_the_ends_of_turns_are_kept_and_told(source: str, runs: list[str]) -> None:
    template, messages = made(source), [*TALK[1:4], {"role": "assistant", "content": "4"}]
    row = template.encoded(messages, "row 1")
    own = template.tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert row.taught == [bool(mark) for mark in own["assistant_masks"]][: len(row.ids)]
    assert learned(template, messages) == runs
    assert not row.has_ends


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(texts, texts.filter(bool)), min_size=1, max_size=3))
def test_marked_text_is_learned_to_the_last_of_the_tokens_of_its_last_character(
    turns: list[tuple[str, str]],
) -> None:
    messages = [m for asked, answered in turns for m in chat(("user", asked), ("assistant", answered))]
    assert learned(made(OPEN), messages) == [answered for _, answered in turns]


def test_rows_that_are_cut_and_last_answers_know_whether_ends_are_learned() -> None:
    for source in (OPEN, MARKED):
        row = made(source).encoded(TALK, "row 1")
        assert row.has_ends == last_answer(row).has_ends == cut_to(row, 4).has_ends == (source == MARKED)


def test_marks_with_the_ends_of_turns_have_them() -> None:
    newline = MARKED.replace("<end>{% endgeneration %}", "<end>\n{% endgeneration %}")
    twice = MARKED.replace(MARK, "{% generation %}so:{% endgeneration %} " + MARK)
    next_begins = MARKED.replace(HEAD, "{{ '<pad>[' + m.role + ']' }}")  # as <|im_start|>
    for source in (MARKED, newline, twice, next_begins, TURNS, INST, ENDLESS):
        assert made(source).encoded(TALK, "row 1").has_ends


def test_rendered_prefixes_give_the_mask_of_generation_marks() -> None:
    rendered, marked = (made(template).encoded(TALK, "row 1") for template in (TURNS, MARKED))
    assert rendered == marked
    own = made(MARKED).tokenizer.apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    assert rendered.ids == own["input_ids"][: len(rendered.ids)]
    assert rendered.taught == [bool(mark) for mark in own["assistant_masks"]][: len(rendered.ids)]
    assert not any(own["assistant_masks"][len(rendered.ids) :])


@settings(max_examples=50, deadline=None)
@given(
    st.booleans(), st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.sampled_from([TURNS, INST])
)
def test_tokens_are_those_of_apply_chat_template_and_runs_those_of_the_answers(
    has_system: bool, turns: list[tuple[str, str]], source: str
) -> None:
    messages = chat(*[("system", "Be brief.")] * has_system)
    for asked, answered in turns:
        messages += chat(("user", asked), ("assistant", answered))
    template = made(source)
    row = template.encoded(messages, "row 1")
    assert row.ids == template.tokenizer.apply_chat_template(messages, return_dict=False)[: len(row.ids)]
    before = " " if source == INST else ""
    assert learned(template, messages) == [f"{before}{answered}<end>" for _, answered in turns]


def test_a_prompt_ends_where_the_first_learned_token_begins() -> None:
    for source in (TURNS, MARKED, INST):
        template = made(source)
        row = template.encoded(TALK[1:3], "row 1")
        prompt = template.prompt(TALK[1:2], "row 1")
        assert row.ids[: len(prompt)] == prompt
        assert row.taught == [False] * len(prompt) + [True] * (len(row.ids) - len(prompt))


def test_a_template_without_an_end_of_turn_is_given_one_at_the_end() -> None:
    template = made(ENDLESS)
    assert learned(template, TALK) == ["2\n", "4 é\n<end>"]
    assert template.ends == (template.tokenizer.eos_token_id,)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_row() -> None:
    template = made(FORGETFUL)
    assert learned(template, TALK[1:3]) == ["2<end>"]
    with pytest.raises(
        DataError, match=r"^row 5, message 3: the chat template .* 'tiny' writes .*differently"
    ):
        template.encoded(TALK, "row 5")


@pytest.mark.parametrize("source", [NO_SYSTEM, SILENT_SYSTEM], ids=["refuses", "leaves-out"])
def test_a_system_turn_that_a_template_does_not_take_goes_into_the_user_s(source: str) -> None:
    template = made(source)
    assert not template.takes_system
    assert template.fitting(TALK)[0] == {"role": "user", "content": "Be brief.\n\n1+1?"}
    assert learned(template, template.fitting(TALK)) == ["2<end>", "4 é<end>"]
    assert made(TURNS).fitting(TALK) == TALK


def test_tool_calls_are_learned_and_results_of_tools_are_not() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    tools = [{"name": "add"}]
    found = learned(made(TOOLS), messages, tools=tools)
    assert found == ['{"function": {"name": "add", "arguments": {"a": 1}}}<end>', "It is 2.<end>"]
    row = made(TOOLS).encoded(messages, "row 1", tools)
    assert made(TOOLS).tokenizer.decode(row.ids).startswith('[{"name": "add"}]')
    with pytest.raises(DataError, match=r"^row 1, message 3: .* leaves out turns of the role 'tool'"):
        made(NO_TOOL).encoded(messages, "row 1")


CALL = {"function": {"name": "add", "arguments": {"a": 1}}}
FIRST_CALL = TOOLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")


@pytest.mark.parametrize("text", ["", "Wait."])
@pytest.mark.parametrize(
    ("source", "calls"),
    [
        (TURNS, {"tool_calls": [CALL]}),
        (MARKED, {"tool_calls": [CALL]}),
        (TOOLS, {"function_call": CALL["function"]}),
        (FIRST_CALL, {"tool_calls": [CALL, {"function": {"name": "subtract"}}]}),
        (FIRST_CALL, {"tool_calls": [CALL, CALL]}),
    ],
    ids=["rendered", "marked", "older-key", "second-call", "equal-calls"],
)
def test_a_call_that_a_template_leaves_out_is_refused(source: str, calls: dict[str, Any], text: str) -> None:
    messages = [*TALK[1:4], {"role": "assistant", "content": text, **calls}]
    key = next(iter(calls))
    with pytest.raises(DataError, match=rf"^row 1, message 4: .* leaves out a call of a function \({key}\)"):
        made(source).encoded(messages, "row 1")


@pytest.mark.parametrize("first", [0, 1], ids=["all", "from-the-second"])
def test_calls_outside_the_marks_are_told(first: int) -> None:
    call = "{% for call in (m.tool_calls or [])FROM %}{{ call | tojson }}{% endfor %}"
    inside = MARKED.replace(MARK, MARK.replace("<end>", call.replace("FROM", "") + "<end>"))
    outside = MARKED.replace(
        MARK, MARK.replace("<end>", call.replace("FROM", f"[:{first}]") + "<end>")
    ).replace("{% endgeneration %}", "{% endgeneration %}" + call.replace("FROM", f"[{first}:]"))
    calls = [CALL, {"function": {"name": "subtract"}}]
    messages = [*TALK[1:4], {"role": "assistant", "content": "", "tool_calls": calls}]
    written = '{"function": {"name": "add", "arguments": {"a": 1}}}'
    assert learned(made(outside), messages) == ["2<end>", written * first + "<end>"]
    assert learned(made(inside), messages) == ["2<end>", written + '{"function": {"name": "subtract"}}<end>']
    for source, has_calls in ((outside, False), (inside, True), (TOOLS, True)):
        assert made(source).encoded(messages, "row 1").has_calls == has_calls
    assert made(outside).encoded(TALK, "row 1").has_calls


def test_calls_that_a_template_writes_are_not_refused() -> None:
    messages = [*TALK[1:2], {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}]
    written = '{"function": {"name": "add", "arguments": {"a": 1}}}'
    assert learned(made(TOOLS), messages) == [f"{written}{written}<end>"]
    assert made(TURNS).encoded([*TALK[1:2], {**TALK[2], "tool_calls": []}], "row 1")
    strict = "{% if not messages[1].tool_calls %}{{ raise_exception('no call') }}{% endif %}"
    needing = made("{% if messages[1:] %}" + strict + "{% endif %}" + TOOLS)
    assert learned(needing, messages) == [f"{written}{written}<end>"]


def test_an_error_of_the_template_names_the_row_and_the_roles() -> None:
    with pytest.raises(DataError, match=r"^row 3: .* fails on a chat of the turns system, user.*: No system"):
        made(NO_SYSTEM).encoded(TALK, "row 3")


def test_chats_need_a_template_and_a_fast_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        ChatTemplate(tokenizer)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.integers(2, 120))
def test_chats_that_are_too_long_lose_whole_exchanges_at_their_end(
    turns: list[tuple[str, str]], longest: int
) -> None:
    template, messages = made(TURNS), chat(("system", "Be brief."))
    for asked, answered in turns:
        messages += chat(("user", asked), ("assistant", answered))
    counts = Shortened()
    row = template.shortened(messages, "row 1", longest, counts)
    wholes = [template.encoded(messages[: 3 + 2 * n], "row 1") for n in range(len(turns))]
    fitting = [whole for whole in wholes if len(whole.ids) <= longest]
    assert len(row.ids) <= longest
    assert any(row.taught)
    if fitting:
        assert row == fitting[-1]
        lost = 2 * (len(turns) - len(fitting))
        assert counts == Shortened(chats=bool(lost), turns=lost)
    else:
        assert counts.first == 1
        assert counts.turns == 2 * (len(turns) - 1)
        assert row.ids == wholes[0].ids[len(wholes[0].ids) - len(row.ids) :] or not row.taught[0]


@pytest.mark.slow
def test_smollm2_s_chats_are_those_of_its_own_template() -> None:
    from fedsmoothlora.modeling.settings import ModelSettings
    from fedsmoothlora.modeling.text import load_tokenizer

    template = ChatTemplate(load_tokenizer(ModelSettings(source="pkg:smollm2-135m")))
    for messages in (TALK, TALK[1:]):  # it writes a system turn of its own if there is none
        row = template.encoded(messages, "row 1")
        assert row.ids == template.tokenizer.apply_chat_template(messages, return_dict=False)[:-1]
        assert learned(template, messages) == ["2<|im_end|>", "4 é<|im_end|>"]
    assert [template.tokenizer.decode([token]) for token in template.ends] == ["<|im_end|>"]
