"""Texts of users in reports: printable, short, and distinct."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsmoothlora.reports.formats import distinct, printable, shortened


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\x00\x1b[31m", "a\\nb\\x00\\x1b[31m"),
        ("safe\u202egnp.exe", "safe\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
        ("\uffff", "\\uffff"),
        ("猫 é 👩\u200d⚕️ می\u200cخواهم", "猫 é 👩\u200d⚕️ می\u200cخواهم"),
    ],
)
def test_control_characters_are_shown_and_writing_is_kept(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_long_text_is_shortened_in_its_middle() -> None:
    assert shortened("2024-hospital-north", 11) == "2024-…north"
    assert shortened("short", 5) == "short"


@settings(max_examples=50)
@given(st.lists(st.text(max_size=40), unique=True, max_size=12), st.integers(8, 20))
def test_no_two_texts_are_shortened_to_the_same(texts: list[str], most: int) -> None:
    found = distinct(texts, most)
    assert len(set(found)) == len(texts)
    assert all(len(text) <= most for text in found)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=8).map("".join), st.integers(1, 12))
def test_texts_that_differ_in_their_middle_alone_stay_apart(middle: str, count: int) -> None:
    texts = [f"{middle * 9}{number}{middle * 9}" for number in range(count)]
    assert len(set(distinct(texts, 12))) == count


def test_short_texts_are_kept() -> None:
    assert distinct(["dog", "cat"], 14) == ["dog", "cat"]


def test_texts_with_the_same_beginning_and_end_are_shown_by_their_difference() -> None:
    names = [f"a rather long class name number {number:02} of twenty" for number in range(20)]
    assert distinct(names, 12) == [f"…{number:02}…" for number in range(20)]
    assert distinct(["north", *names[:2]], 12) == ["north", "…0…", "…1…"]
