"""docs/methods.svg agrees with the code, and its labels and dots are apart."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from fedsmoothlora import methods
from tools.methods_picture import Point, picture, points

DOCUMENT = Path(__file__).parents[2] / "docs" / "methods.svg"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def found() -> list[Point]:
    return points()


def test_the_picture_is_the_output_of_the_command(found: list[Point]) -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == picture(found), "run `make docs`"


def test_every_method_has_a_dot_and_a_name(found: list[Point]) -> None:
    root = ET.fromstring(picture(found))
    labels = [text.text or "" for text in root.iter(f"{SVG}text")]
    named = {name for label in labels for name in label.split(", ")}
    assert set(methods.names()) <= named
    families = len({point.family for point in found})
    assert len(list(root.iter(f"{SVG}circle"))) == len(found) + families


def test_what_costs_more_is_further_right_and_up() -> None:
    few = [Point("a", "exact", 10, 10), Point("b", "merged", 1000, 100), Point("c", "personal", 0, 0)]
    root = ET.fromstring(picture(few))
    dots = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in root.iter(f"{SVG}circle")][-3:]
    assert dots[2][0] < dots[0][0] < dots[1][0]
    assert dots[2][1] > dots[0][1] > dots[1][1]
