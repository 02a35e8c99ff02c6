"""Text of other people and machines: on one line, without control characters, and short."""

from hypothesis import given
from hypothesis import strategies as st

from fedsmoothlora.printable import listed, markdown, printable

ANY_TEXT = st.text(st.characters(), max_size=120)


@given(ANY_TEXT, st.integers(1, 100))
def test_any_text_becomes_one_short_printable_line(text: str, longest: int) -> None:
    shown = printable(text, longest)
    assert shown.isprintable()
    assert len(shown) <= 10 * longest + 3
    shown.encode("utf-8")


@given(st.text(st.characters(categories=["L", "N"]), max_size=80))
def test_an_ordinary_name_is_shown_as_it_is(name: str) -> None:
    assert printable(name) == name


def test_escapes_line_breaks_and_reversed_text_are_visible() -> None:
    assert printable("a\nb\x1b[31m\u202e\ud800") == r"a\nb\x1b[31m\u202e\ud800"


def test_long_texts_and_long_lists_are_cut() -> None:
    assert printable("x" * 8_000_000) == "x" * 80 + "..."
    assert listed(["a", "b\n", *"cdefg"]) == r"a, b\n, c, d, e and 2 more"
    assert listed([]) == "none"


@given(ANY_TEXT)
def test_markdown_holds_no_link_no_tag_and_no_cell_border(text: str) -> None:
    shown = markdown(text)
    for position, one in enumerate(shown):
        if one in "|[]<>&`":
            assert shown[position - 1] == "\\"
