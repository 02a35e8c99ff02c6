import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import byte_tokenizer
from fedsmoothlora.data.prompts import Speaker, Template, fit

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
    ],
)
def test_a_template_is_filled_with_a_row(text: str, columns: tuple[str, ...], filled: str) -> None:
    template = Template(text, "task.prompt")
    assert template.columns == columns
    assert template.fill({"q": "two?", "a": "2"}) == filled


@pytest.mark.parametrize("text", ["{q", "q}", "{}", "{q:>3}", "{q!r}"])
def test_what_is_no_template_is_refused_by_its_key(text: str) -> None:
    with pytest.raises(ValueError, match=r"^task\.prompt = "):
        Template(text, "task.prompt")


def test_braces_inside_a_value_are_text() -> None:
    assert Template("{q}", "k").fill({"q": "{a} {0}"}) == "{a} {0}"


def test_prompt_and_answer_are_their_own_tokens_and_the_end() -> None:
    speaker = Speaker(byte_tokenizer())
    prompts, answers = speaker.prompts(["Q: 1+1?"]), speaker.answers(["Q: 1+1?"], [" 2"])
    assert decoded(prompts[0]) == "Q: 1+1?"
    assert decoded(answers[0]) == " 2<end>"


def test_a_chat_is_what_the_tokenizer_s_own_template_writes() -> None:
    tokenizer = byte_tokenizer()
    speaker = Speaker(tokenizer, chat=True, system="Be brief.")
    prompts, answers = speaker.prompts(["1+1?"]), speaker.answers(["1+1?"], ["2"])
    assert decoded(prompts[0]) == "[system]Be brief.<end>\n[user]1+1?<end>\n[assistant]"
    assert decoded(answers[0]) == "2<end>"  # and not the line's end after it
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole == decoded([*prompts[0], *answers[0]]) + "\n"


@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=5), st.integers(2, 24))
def test_rows_that_fit_stay_and_answers_are_cut_only_where_they_alone_are_too_long(
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
