from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import byte_tokenizer
from fedsmoothlora.data.prompts import Speaker, Template, fit
from fedsmoothlora.errors import ConfigError

tokens = st.lists(st.integers(0, 255), min_size=1, max_size=12)


def decoded(ids: list[int]) -> str:
    return byte_tokenizer().decode(ids)


@pytest.mark.parametrize(
    ("text", "columns", "filled"),
    [
        ("Q: {q}\nA:", ("q",), "Q: two?\nA:"),
        ("{q}{q} {{x}}", ("q",), "two?two? {x}"),
        ("{a} {q}", ("a", "q"), "2 two?"),
        ("no column", (), "no column"),
        ("{a.b} {0}", ("a.b", "0"), "dotted zero"),
    ],
)
def test_a_template_is_filled_with_a_row(text: str, columns: tuple[str, ...], filled: str) -> None:
    template = Template(text, "task.prompt")
    assert template.columns == columns
    assert template.fill({"q": "two?", "a": "2", "a.b": "dotted", "0": "zero"}) == filled


@pytest.mark.parametrize("text", ["{q", "q}", "{}", "{q:>3}", "{q!r}"])
def test_an_invalid_template_is_refused_with_its_key(text: str) -> None:
    with pytest.raises(ValueError, match=r"^task\.prompt = "):
        Template(text, "task.prompt")


def test_braces_inside_a_value_are_text() -> None:
    assert Template("{q}", "k").fill({"q": "{a} {0}"}) == "{a} {0}"


def test_prompt_and_answer_are_tokenised_separately_with_an_end_of_sequence() -> None:
    speaker = Speaker(byte_tokenizer())
    prompts, answers = speaker.prompts(["Q: 1+1?"]), speaker.answers(["Q: 1+1?"], [" 2"])
    assert decoded(prompts[0]) == "Q: 1+1?"
    assert decoded(answers[0]) == " 2<end>"


def test_a_chat_follows_the_tokenizers_own_template() -> None:
    tokenizer = byte_tokenizer()
    speaker, systems = Speaker(tokenizer, chat=True), ["Be brief."]
    prompts, answers = speaker.prompts(["1+1?"], systems), speaker.answers(["1+1?"], ["2"], systems)
    assert decoded(prompts[0]) == "[system]Be brief.<end>\n[user]1+1?<end>\n[assistant]"
    assert decoded(answers[0]) == "2<end>"  # and not the line's end after it
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == decoded([*prompts[0], *answers[0]]) + "\n"


TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system turn') }}{% endif %}"
ONLY_USERS = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"


def chat_tokenizer(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.name_or_path, tokenizer.chat_template = "tiny", template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "why"),
    [(NO_SYSTEM + TURNS, "refuses it: No system turn"), (ONLY_USERS, "leaves it out")],
)
def test_a_system_message_that_the_chat_template_does_not_take_is_refused(template: str, why: str) -> None:
    speaker = Speaker(chat_tokenizer(template), chat=True)
    with pytest.raises(
        ConfigError, match=rf"^task\.system = 'Be brief\.': the chat template of .*'tiny' {why}"
    ):
        speaker.prompts(["1+1?"], ["Be brief."])
    assert speaker.prompts(["1+1?"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[7].content }}",
        "{{ messages + 1 }}",
        "{% for m in messages %}",
        "{{ strftime_now(3) }}",
    ],
)
def test_any_error_of_a_chat_template_names_the_tokenizer_and_the_key(template: str) -> None:
    speaker = Speaker(chat_tokenizer(template), chat=True)
    for tokens in (lambda: speaker.prompts(["x"]), lambda: speaker.answers(["x"], ["y"])):
        with pytest.raises(ConfigError, match=r"^task\.chat = true: the chat template of .* 'tiny' fails"):
            tokens()


def test_a_chat_template_that_refuses_answers_is_an_error() -> None:
    refusing = "{% if messages[-1]['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}" + TURNS
    with pytest.raises(ConfigError, match="fails on a chat of the turns user, assistant: no"):
        Speaker(chat_tokenizer(refusing), chat=True).answers(["x"], ["y"])


def test_a_chat_template_that_rewrites_the_prompt_is_an_error() -> None:
    counting = "{{ messages | length }}" + TURNS
    with pytest.raises(ConfigError, match=r"^task\.chat = true: .* 'tiny' writes the prompt differently"):
        Speaker(chat_tokenizer(counting), chat=True).answers(["x"], ["y"])


@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5), st.integers(2, 24))
def test_answers_are_cut_only_if_they_alone_are_too_long(
    rows: list[tuple[list[int], list[int]]], longest: int
) -> None:
    prompts, answers, cut = fit([p for p, _ in rows], [a for _, a in rows], longest)
    cut_prompts = cut_answers = 0
    for (prompt, answer), kept_prompt, kept_answer in zip(rows, prompts, answers, strict=True):
        assert len(kept_prompt) + len(kept_answer) <= longest
        assert kept_prompt
        assert prompt[len(prompt) - len(kept_prompt) :] == kept_prompt
        assert answer[: len(kept_answer)] == kept_answer
        if len(prompt) + len(answer) <= longest:
            assert (kept_prompt, kept_answer) == (prompt, answer)
        if len(answer) < longest:
            assert kept_answer == answer
        cut_prompts += kept_prompt != prompt
        cut_answers += kept_answer != answer
    assert (cut.prompts, cut.answers) == (cut_prompts, cut_answers)


@given(st.lists(st.tuples(tokens, tokens, tokens), min_size=1, max_size=5), st.integers(2, 24))
def test_rows_with_one_prompt_keep_the_same_end_of_it(
    rows: list[tuple[list[int], list[int], list[int]]], longest: int
) -> None:
    twice = [prompt for prompt, _, _ in rows for _ in range(2)]
    whole = [answer for _, *pair in rows for answer in pair]
    prompts, answers, _ = fit(twice, whole, longest, same_prompt=2)
    alone, wanted, _ = fit(twice, whole, longest)
    assert answers == wanted
    assert prompts[::2] == prompts[1::2]
    for pair, (one, other) in enumerate(zip(alone[::2], alone[1::2], strict=True)):
        assert prompts[2 * pair] == min(one, other, key=len)
